"""Preparing a corpus on many nodes: an array of tasks on Slurm, each of which runs the command that a person would."""

import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from data_pipeline.preparation.job import LOGS_NAME, Request, open_job
from launch.cluster.profile import ClusterProfile, load_profile, one_line, time_limit_seconds
from launch.cluster.script import option_lines, site_options, template
from launch.cluster.slurm import Slurm, SlurmRefusedError
from pretrain.run_dir import write_durably

CODE = Path(__file__).parents[2]
SCRIPT_FILE = "job.sbatch"
CORPUS_FILE = "corpus.yaml"
# Where Python looks for code, that what a process said last is in its log, and that it leaves no files beside the code.
ENVIRONMENT = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass(frozen=True)
class PreparationArray:
    """An array of `tasks` tasks that prepare what is requested, each with `workers` cores of its node."""

    cluster: str
    tasks: int
    request: Request
    workers: int | None = None
    time_limit: str | None = None

    def profile(self) -> ClusterProfile:
        """The cluster's. Raises ValueError where it, or what is asked for, is wrong."""
        if self.tasks < 1:
            raise ValueError(f"--tasks {self.tasks}: give a number, 1 or more")
        if self.time_limit is not None:
            time_limit_seconds(self.time_limit)
        for path in (self.logs, Path.cwd()):
            one_line(str(path))
        return load_profile(self.cluster)

    @property
    def logs(self) -> Path:
        """The folder of the tasks' logs, the batch script and the corpus as it is at submission."""
        return self.request.out.resolve() / LOGS_NAME

    def words(self) -> list[str]:
        """What a task runs."""
        request = self.request
        words = ["data", "prepare", "--corpus", str(self.logs / CORPUS_FILE), "--tokenizer", request.tokenizer_path]
        words += ["--out", str(request.out.resolve())]
        words += [] if self.workers is None else ["--workers", str(self.workers)]
        return words + [word for length in request.packs for word in ("--pack", str(length))]

    def script(self) -> str:
        """The batch script. Raises ValueError where the profile, or what is asked for, is wrong."""
        profile = self.profile()
        logs = str(self.logs).replace("%", "%%")
        given: dict[str, object | None] = {
            "job-name": f"prepare-{self.logs.parent.name}",
            "chdir": str(Path.cwd()),
            "output": f"{logs}/task_%A_%a.log",
            "open-mode": "append",
            "export": "ALL",
            "array": f"0-{self.tasks - 1}",
            "nodes": 1,
            "ntasks": 1,
            "cpus-per-task": self.workers or profile.cpus_per_rank,
            **site_options(profile),
            "time": self.time_limit or profile.time_limit,
        }
        return template("prepare.sbatch.j2").render(
            options=option_lines(given, profile, profile.requeue),
            python=profile.python or sys.executable,
            modules=profile.modules,
            setup=profile.setup,
            environment=ENVIRONMENT | profile.environment,
            code=str(CODE),
            words=self.words(),
        )

    def tested(self) -> str:
        """What `sbatch --test-only` says. Raises ValueError where Slurm would refuse; else as Slurm's methods do."""
        try:
            return Slurm(self.profile().slurm_timeout_seconds).test_only(self.script()).strip()
        except SlurmRefusedError as error:
            raise ValueError(f"Slurm would refuse this job: {error}") from None

    def submit(self) -> str | None:
        """Queue the array, once its plan is made and so everything that can be wrong with it has been looked at.

        Returns the job's id; None where there is nothing left to do. Raises ValueError, OSError (such as SlurmError).
        """
        self.tested()
        with open_job(self.request) as job:
            if job is None:
                return None
        self.logs.mkdir(exist_ok=True)
        corpus = yaml.safe_dump(self.request.corpus.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_durably(self.logs / CORPUS_FILE, corpus)
        (self.logs / CORPUS_FILE).chmod(0o600)  # a URL in it may be signed
        script = self.script()
        write_durably(self.logs / SCRIPT_FILE, script)
        return Slurm(self.profile().slurm_timeout_seconds).sbatch(script)
