"""`--sweep KEY=V1,V2`: the product of the values as one job array, a run folder for each point."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster.environment import job_environment
from launch.cluster.record import JobRecord
from launch.cluster.script import check_folder, render_sweep
from launch.cluster.slurm import Slurm, SlurmError
from launch.cluster.submit import Request, Submission, checked, prepared, queued, recorded, tested
from launch.run_folder import SWEEP_NAME
from pretrain.run_dir import RunDir, read_json, write_durably, write_json

SCRIPT_FILE = "job.sbatch"
MOST_POINTS = 1000  # Slurm's usual limit of a job array (MaxArraySize)


@dataclass(frozen=True)
class Point:
    """One combination of values. `name`, of its folder, starts with its number in the array."""

    name: str
    values: dict[str, str]

    @property
    def overrides(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.values.items()]


@dataclass(frozen=True)
class Sweep:
    """A submitted sweep: its folder, and its points in the order of the array's tasks."""

    folder: Path
    job_id: str | None
    points: tuple[Point, ...]

    @property
    def runs(self) -> list[RunDir]:
        return [RunDir(self.folder / point.name) for point in self.points]

    @classmethod
    def read(cls, folder: Path) -> "Sweep":
        """Raises ValueError if the folder is not a sweep."""
        tree = read_json(folder / SWEEP_NAME)
        return cls(folder, tree["job_id"], tuple(Point(**point) for point in tree["points"]))

    def write(self) -> None:
        points = [{"name": point.name, "values": point.values} for point in self.points]
        write_json(self.folder / SWEEP_NAME, {"job_id": self.job_id, "points": points})


def points_of(sweeps: list[str]) -> list[Point]:
    """The product of `--sweep KEY=V1,V2,...`, the last one varying fastest. Values are YAML, as in `--set`.

    Raises ValueError where one is malformed, or says something twice.
    """
    axes: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        values = [value.strip() for value in split_values(text)]
        if not equals or not all(key.split(".")) or not all(values):
            raise ValueError(f"--sweep {sweep}: expected KEY=VALUE,VALUE,... such as optimizer.lr=1e-3,3e-4")
        if key in axes:
            raise ValueError(f"--sweep {sweep}: {key} is swept already; give all its values in one --sweep")
        if len(set(values)) < len(values):
            raise ValueError(f"--sweep {sweep}: a value stands there twice, and would train the same run twice")
        axes[key] = values
    combinations = list(itertools.product(*axes.values()))
    if len(combinations) > MOST_POINTS:
        raise ValueError(f"--sweep asks for {len(combinations)} runs, more than {MOST_POINTS}: leave out some values")
    digits = len(str(len(combinations) - 1))
    points = []
    for number, values_of_point in enumerate(combinations):
        chosen = dict(zip(axes, values_of_point, strict=True))
        words = "_".join(f"{key.split('.')[-1]}={value}" for key, value in chosen.items())
        safe = re.sub(r"[^A-Za-z0-9._=+-]+", "-", words)[:100]
        points.append(Point(f"{number:0{digits}d}_{safe}", chosen))
    return points


def split_values(text: str) -> Iterator[str]:
    """Values between commas, of which those in brackets or quotes separate nothing."""
    value, depth, quote = "", 0, ""
    for character in text:
        if character == "," and not depth and not quote:
            yield value
            value = ""
            continue
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{(") - (character in "]})")
        value += character
    yield value


@dataclass(frozen=True)
class CheckedSweep:
    """A sweep that may be submitted: every point of it checked."""

    folder: Path
    points: list[Point]
    ready: list[Submission]
    record: JobRecord
    environment: dict[str, str]
    script: str


def checked_sweep(
    recipe: str, overrides: list[str], sweeps: list[str], folder: Path, request: Request, parallel: int | None
) -> CheckedSweep:
    """Every point checked as a run of its own is. Raises ValueError, naming the point; writes nothing."""
    folder = folder.resolve()
    if request.chain > 1:
        raise ValueError(f"--chain {request.chain} does not go with --sweep: both are job arrays; submit points singly")
    if parallel is not None and parallel < 1:
        raise ValueError(f"--parallel {parallel}: give a number of points, 1 or more")
    check_folder(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: choose another --run-dir")
    record = request.record().model_copy(update={"sweep": str(folder)})
    points, ready = points_of(sweeps), []
    for point in points:
        try:
            ready.append(checked(recipe, [*overrides, *point.overrides], folder / point.name, record))
        except ValueError as error:
            raise ValueError(f"point {point.name} of the sweep: {error}") from None
    # One script for all: the longest time-out that one of them needs.
    environment = job_environment(record.profile, max(one.config.health.hang_seconds for one in ready))
    script = render_sweep(record, folder, [one.run for one in ready], parallel, ready[0].config.name, environment)
    return CheckedSweep(folder, points, ready, record, environment, script)


def submit_sweep(sweep: CheckedSweep) -> dict[str, Any]:
    """Make every folder, then queue the array; returns what is told about it. Raises ValueError, SlurmError."""
    tested(sweep.record, sweep.script)
    (sweep.folder / "logs").mkdir(parents=True)
    made = Sweep(sweep.folder, None, tuple(sweep.points))
    made.write()
    write_durably(sweep.folder / SCRIPT_FILE, sweep.script)
    records = []
    for one in sweep.ready:
        with prepared(one):
            records.append(recorded(one.run, sweep.record, sweep.environment))
    try:
        job_id = Slurm(sweep.record.profile.slurm_timeout_seconds).sbatch(sweep.script)
    except SlurmError as error:
        raise type(error)(f"{error}; nothing of {sweep.folder} was trained: remove it, and submit again") from None
    Sweep(sweep.folder, job_id, made.points).write()
    for task, (one, record) in enumerate(zip(sweep.ready, records, strict=True)):
        queued(one.run, record, f"{job_id}_{task}", "submit")
    return {"job_id": job_id, "points": [str(one.run.path) for one in sweep.ready]}
