"""The folder in which a preparation is worked on, by any number of processes on any number of machines at once.

prepare.unfinished/
    job.json        what is prepared, decided once (plan.py)
    job.lock        held by a process that reads or writes job.json
    running.lock    held, shared, by every process that works on the job
    locks/TASK      held by the process that does a task; free at once when it dies, since the kernel lets go of it
    done/TASK.json  what came of a task: written last, so that a task without one was never done
    units/          what the tasks write

Locks are flock's, which work across machines on NFS, GPFS, BeeGFS and on Lustre mounted with `flock`.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_pipeline.preparation.plan import Plan
from data_pipeline.shards import sync_folder, write_atomically

UNFINISHED_NAME = "prepare.unfinished"


@dataclass(frozen=True)
class WorkFolder:
    """Paths, locks and completion markers of the job that writes the data folder `out`."""

    out: Path

    @property
    def path(self) -> Path:
        return self.out / UNFINISHED_NAME

    @property
    def job_path(self) -> Path:
        return self.path / "job.json"

    @property
    def contamination_path(self) -> Path:
        """The n-grams of the evaluation sets."""
        return self.path / "contamination"

    @property
    def duplicates_path(self) -> Path:
        return self.path / "duplicates"

    def unit_path(self, unit: int) -> Path:
        """What was read of a unit."""
        return self.path / "units" / f"{unit:06d}"

    def selected_path(self, unit: int) -> Path:
        """What is left of a unit without duplicates."""
        return self.path / "units" / f"{unit:06d}.selected"

    def make(self) -> None:
        """Make the folder if it is not there."""
        for name in ("locks", "done", "units"):
            (self.path / name).mkdir(parents=True, exist_ok=True)

    def remove(self) -> None:
        """Remove the folder. Processes that still look for tasks see it vanish at once."""
        vanished = self.path.with_name(f"{UNFINISHED_NAME}.{os.getpid()}.tmp")
        self.path.rename(vanished)
        shutil.rmtree(vanished)
        sync_folder(self.out)

    def read_plan(self) -> Plan:
        """The plan of the job.

        Raises:
            ValueError: it is damaged, or of another version of this program.
        """
        try:
            return Plan.from_json(json.loads(self.job_path.read_bytes()))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.job_path} is damaged ({error}): remove {self.path} and start again") from error

    def write_plan(self, plan: Plan) -> None:
        write_atomically(self.job_path, json.dumps(plan.to_json()).encode())

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Wait for the right to read or write job.json."""
        with open(self.path / "job.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether no process works on the job; to be asked within `planning`."""
        with open(self.path / "running.lock", "w") as file:
            yield _locked(file, fcntl.LOCK_EX)

    @contextmanager
    def working(self) -> Iterator[None]:
        """What a process holds for as long as it works on the job."""
        with open(self.path / "running.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    @contextmanager
    def claimed(self, task: str) -> Iterator[bool]:
        """Take a task, unless another process has it (then False). It is given back at the end, or by dying."""
        with open(self.path / "locks" / task, "w") as file:
            yield _locked(file, fcntl.LOCK_EX)

    def is_done(self, task: str) -> bool:
        return self._marker(task).exists()

    def tasks_done(self) -> set[str]:
        """The names of all tasks that are done."""
        return {entry.name.removesuffix(".json") for entry in os.scandir(self.path / "done")}

    def mark_done(self, task: str, result: dict[str, Any]) -> None:
        """Declare a task done. Everything that it wrote must be on the disk."""
        write_atomically(self._marker(task), json.dumps(result).encode())

    def result(self, task: str) -> dict[str, Any]:
        """What a task that is done has left."""
        result: dict[str, Any] = json.loads(self._marker(task).read_bytes())
        return result

    def _marker(self, task: str) -> Path:
        return self.path / "done" / f"{task}.json"


def _locked(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def fresh_folder(path: Path) -> Path:
    """An empty folder, without what an attempt that died left in it."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def sync_files(folder: Path) -> None:
    """Bring all files of a folder to the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_folder(folder)
