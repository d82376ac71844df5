"""The batch script: slurm/pretrain.sbatch.j2, filled in from a run's job.json. Every value is quoted, for bash or, in
#SBATCH lines, as sbatch reads them."""

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from launch.cluster.environment import job_folders
from launch.cluster.profile import ClusterProfile, one_line
from launch.cluster.record import JobRecord
from pretrain.run_dir import RunDir

TEMPLATES = Path(__file__).parents[2] / "slurm"
PLAIN = re.compile(r"[A-Za-z0-9@%_+=:,./^-]+")
VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")


def render(record: JobRecord, run: RunDir, name: str, environment: Mapping[str, str]) -> str:
    """The batch script of one run. name: what the queue shows. environment: as `job_environment` gives it."""
    lines = options(record, run.path, name, "job_%j.log")
    return _render(record, lines, environment, run=str(run.path), points=[])


def render_sweep(
    record: JobRecord,
    folder: Path,
    points: list[RunDir],
    parallel: int | None,
    name: str,
    environment: Mapping[str, str],
) -> str:
    """The batch script of a job array with a task for each point of a sweep in `folder`, `parallel` of them at a time.

    All points are submitted as `record` says.
    """
    at_a_time = "" if parallel is None else f"%{parallel}"
    lines = [*options(record, folder, name, "job_%A_%a.log"), f"--array=0-{len(points) - 1}{at_a_time}"]
    return _render(record, lines, environment, run="", points=[str(point.path) for point in points])


def _render(record: JobRecord, lines: list[str], environment: Mapping[str, str], run: str, points: list[str]) -> str:
    profile = record.profile
    return template("pretrain.sbatch.j2").render(
        options=lines,
        run=run,
        points=points,
        python=profile.python or sys.executable,
        local_folder=profile.local_folder,
        modules=profile.modules,
        setup=profile.setup,
        environment=environment,
        folders=job_folders(profile),
        staging=profile.staging,
        container=profile.container is not None,
    )


def template(name: str) -> Template:
    """A template of bash, not HTML."""
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"quoted": shlex.quote, "expanded": expanded}
    return templates.get_template(name)


def options(record: JobRecord, folder: Path, name: str, log: str) -> list[str]:
    """What stands in #SBATCH lines. `log`: the name of Slurm's log in the folder's `logs`, in sbatch's pattern."""
    profile = record.profile
    given: dict[str, object | None] = {
        "job-name": name,
        "chdir": str(folder),
        "output": f"{str(folder / 'logs').replace('%', '%%')}/{log}",
        "open-mode": "append",
        "export": "ALL",
        "nodes": record.nodes,
        "ntasks-per-node": record.ranks_per_node if profile.launcher == "srun" else 1,
        "cpus-per-task": cpus_per_task(record),
        **site_options(profile),
        "time": record.time_limit,
        "signal": f"B:USR1@{record.signal_lead_seconds}",
        "exclude": ",".join(record.exclude) or None,
    }
    if record.gpus_per_node and profile.gpu_request != "none":
        kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
        gres = profile.gpu_request == "gres"
        given["gres" if gres else "gpus-per-node"] = f"{'gpu:' * gres}{kind}{record.gpus_per_node}"
    if record.chain > 1:
        given["array"] = f"1-{record.chain}%1"
    return option_lines(given, profile, profile.requeue and record.chain == 1)


def site_options(profile: ClusterProfile) -> dict[str, object | None]:
    """What every job of a site asks for alike."""
    names = ("partition", "account", "qos", "reservation", "constraint")
    return {"mem": profile.memory_per_node} | {name: getattr(profile, name) for name in names}


def option_lines(given: Mapping[str, object | None], profile: ClusterProfile, requeue: bool) -> list[str]:
    """Options by name as #SBATCH lines have them, without those that are None, and the profile's flags."""
    lines = [f"--{option}={sbatch_quoted(str(value))}" for option, value in given.items() if value is not None]
    flags = ["--requeue" if requeue else "--no-requeue", *["--exclusive"] * profile.exclusive]
    return [*lines, *flags, *(_option_quoted(option) for option in profile.sbatch_options)]


def cpus_per_task(record: JobRecord) -> int | None:
    """Cores of one of srun's tasks: a rank, or with torchrun all ranks of a node."""
    cores = record.profile.cpus_per_rank
    return cores if cores is None or record.profile.launcher == "srun" else cores * record.ranks_per_node


def check_folder(path: Path) -> None:
    """Raise ValueError for a run's folder whose name would not come through sbatch, bash and PYTHONPATH as it is."""
    one_line(str(path))
    for character, reason in (("\\", "sbatch reads it as an escape"), (":", "it separates the folders of PYTHONPATH")):
        if character in str(path):
            raise ValueError(
                f"--run-dir {path}: there must be no {character} in its path, for {reason}; choose another"
            )


def sbatch_quoted(text: str) -> str:
    """A value in an #SBATCH line: sbatch knows double quotes, and a backslash before what is not to be special."""
    return text if PLAIN.fullmatch(text) else '"' + re.sub(r'(["\\])', r"\\\1", one_line(text)) + '"'


def _option_quoted(option: str) -> str:
    name, equals, value = option.partition("=")
    return f"{name}{equals}{sbatch_quoted(value)}" if value else option


def expanded(text: str) -> str:
    """Quoted for bash but for each $NAME, which must be set."""
    words, end = "", 0
    for found in VARIABLE.finditer(text):
        words += shlex.quote(text[end : found.start()]) if found.start() > end else ""
        words += '"${' + found.group(1) + ':?}"'
        end = found.end()
    return words + (shlex.quote(text[end:]) if end < len(text) else "")
