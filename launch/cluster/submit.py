"""Submitting a run to Slurm. All that can be wrong is found before anything is queued, or written."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster.environment import job_environment, job_folders
from launch.cluster.freeze import freeze
from launch.cluster.profile import ClusterProfile, load_profile, time_limit_seconds
from launch.cluster.record import JobRecord, append_attempt
from launch.cluster.script import check_folder, render
from launch.cluster.slurm import Slurm, SlurmError, SlurmRefusedError
from launch.run_checks import check_data, check_ranks, fingerprints, with_checked_init
from launch.run_folder import checked_recipe, new_run
from pretrain.config import RunConfig
from pretrain.recipe import load_config
from pretrain.run_dir import RunDir, write_durably


@dataclass(frozen=True)
class Request:
    """The words of the command line about the job. None, or a chain of 1: as the profile says.

    cluster: a profile's name or path. time_limit: in Slurm's form. chain: jobs in a row.
    """

    cluster: str
    nodes: int
    gpus_per_node: int | None = None
    time_limit: str | None = None
    chain: int = 1

    def record(self, profile: ClusterProfile | None = None) -> JobRecord:
        """How the job will be submitted, with this profile instead of the one that `cluster` names if one is given.

        Raises ValueError where the request, or the profile, is wrong.
        """
        profile = profile or load_profile(self.cluster)
        for flag, value in (("--nodes", self.nodes), ("--gpus-per-node", self.gpus_per_node), ("--chain", self.chain)):
            if value is not None and value < 1:
                raise ValueError(f"{flag} {value}: give a number, 1 or more")
        limit = self.time_limit or profile.time_limit
        lead = profile.signal_lead_seconds
        if limit is not None and lead >= (seconds := time_limit_seconds(limit)):
            raise ValueError(
                f"signal_lead_seconds={lead} of the profile leaves nothing of a time limit of {limit} ({seconds} s) to "
                "train in: ask for more time with --time, or lower signal_lead_seconds to what a step and a save take"
            )
        gpus = self.gpus_per_node or profile.gpus_per_node
        return JobRecord(
            cluster=Path(self.cluster).stem,
            profile=profile,
            nodes=self.nodes,
            gpus_per_node=gpus,
            ranks_per_node=gpus or profile.ranks_per_node,
            time_limit=limit,
            signal_lead_seconds=lead,
            chain=self.chain,
        )


@dataclass(frozen=True)
class Submission:
    """A new run and its job, with nothing wrong as far as can be known without asking Slurm."""

    config: RunConfig
    run: RunDir
    record: JobRecord

    @property
    def script(self) -> str:
        return script_of(self.record, self.run, self.config)


def script_of(record: JobRecord, run: RunDir, config: RunConfig) -> str:
    """The batch script of a run with this config."""
    return render(record, run, config.name, job_environment(record.profile, config.health.hang_seconds))


def checked(recipe: str, overrides: list[str], run_dir: Path, record: JobRecord) -> Submission:
    """Look at recipe, data, layout on the job's ranks, and folder. Raises ValueError; writes nothing."""
    run = RunDir(run_dir.resolve())
    check_folder(run.path)
    config = checked_recipe(recipe, overrides, run)
    check_ranks(config, record.ranks)
    check_paths(record, config, run)
    with_checked_init(config, fingerprints(config, check_data(config))["tokenizer"])
    return Submission(config, run, record)


def check_paths(record: JobRecord, config: RunConfig, run: RunDir) -> None:
    """Raise ValueError if a file that the profile names is missing, or a folder cannot be mounted in its container."""
    sources = (*config.data.sources, *config.evaluation.sources)
    for path in [str(run.path), *(source.path for source in sources)] if record.profile.container is not None else []:
        if "," in path or ":" in path:
            raise ValueError(
                f"{path} cannot be mounted in a container, where a comma or colon ends a path: move it, or link to it "
                "from a plain path"
            )
    staging = record.profile.staging
    if staging is not None and staging.environment_archive and not Path(staging.environment_archive).is_file():
        raise ValueError(f"staging.environment_archive={staging.environment_archive}: there is no such file")


def tested(record: JobRecord, script: str) -> str:
    """What `sbatch --test-only` says of a script.

    Raises ValueError with Slurm's reason where it would refuse, SlurmError where it could not be asked, and
    NoSlurmError where there is none.
    """
    try:
        return Slurm(record.profile.slurm_timeout_seconds).test_only(script).strip()
    except SlurmRefusedError as error:
        raise ValueError(f"Slurm would refuse this job: {error}") from None


def submit(submission: Submission) -> JobRecord:
    """Make the run's folder, with the code in it, and queue its job. Raises ValueError, SlurmError."""
    tested(submission.record, submission.script)
    with prepared(submission):  # a job that starts at once waits for the lock, and so for the record of it
        return submit_prepared(submission.run, submission.record, "submit")


@contextmanager
def prepared(submission: Submission) -> Iterator[None]:
    """Make the run's folder, put the code into it, and hold its lock."""
    with new_run(submission.config, submission.run):
        freeze(submission.run)
        yield


def submit_prepared(run: RunDir, record: JobRecord, why: str, after: str | None = None) -> JobRecord:
    """Queue the job of a run whose folder is there, as `record` says; returns the record with the job's id.

    why: a word or two for attempts.jsonl. after: a job that must have ended, however it did, before this one starts.
    Raises SlurmRefusedError if Slurm refuses: what was submitted before stays on record. Raises SlurmError if it does
    not answer in time: then it is not known whether the job, which reads the new record, is queued.
    """
    config = load_config(run.config_path)
    before = {path: path.read_text(encoding="utf-8") for path in (run.job_path, run.script_path) if path.is_file()}
    record = recorded(run, record, job_environment(record.profile, config.health.hang_seconds))
    script = script_of(record, run, config)
    write_durably(run.script_path, script)
    try:
        job_id = Slurm(record.profile.slurm_timeout_seconds).sbatch(
            script, *([] if after is None else [f"--dependency=afterany:{after}"])
        )
    except SlurmError as error:
        for path, text in before.items() if isinstance(error, SlurmRefusedError) else ():
            write_durably(path, text)
        raise type(error)(
            f"{error}; the run is ready in {run.path}: see if its job is queued (squeue --name={config.name}), and "
            f"if not, queue it with: steppe resume {run.path} --nodes {record.nodes}"
        ) from None
    return queued(run, record, job_id, why)


def recorded(run: RunDir, record: JobRecord, environment: Mapping[str, str]) -> JobRecord:
    """Write down how a job is about to be submitted: it may start, and read that, before sbatch has answered.

    environment: as `job_environment` gives it.
    """
    variables = dict(environment) | job_folders(record.profile)
    record = record.model_copy(update={"environment": variables})
    run.logs.mkdir(exist_ok=True)
    record.write(run)
    return record


def queued(run: RunDir, record: JobRecord, job_id: str, why: str) -> JobRecord:
    """Write down that a job is queued."""
    record = record.model_copy(update={"job_ids": (*record.job_ids, job_id)})
    record.write(run)
    append_attempt(
        run,
        "submitted",
        job_id=job_id,
        nodes=record.nodes,
        ranks=record.ranks,
        cluster=record.cluster,
        why=why,
    )
    return record


def resubmit(
    run: RunDir,
    why: str,
    exclude: Sequence[str] = (),
    chain: int | None = None,
    signal_lead_seconds: int | None = None,
    after: str | None = None,
) -> JobRecord:
    """Submit a run again as it was submitted before, with its frozen code: what its supervisor does in a job.

    exclude: nodes to avoid, beside those that are avoided already. chain: jobs that are left of a chained array.
    signal_lead_seconds: as measured. after: this job, which the next one shall not run beside.
    """
    record = JobRecord.read(run)
    changes: dict[str, Any] = {"exclude": tuple(dict.fromkeys((*record.exclude, *exclude)))}
    if chain is not None:
        changes["chain"] = chain
    if signal_lead_seconds is not None:
        changes["signal_lead_seconds"] = signal_lead_seconds
    return submit_prepared(run, record.model_copy(update=changes), why, after)
