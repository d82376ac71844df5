"""The folder in which a preparation is worked on, by any number of processes on any number of machines at once.

prepare.unfinished/
    job.json        what is prepared, decided once (plan.py)
    job.lock        held by a process that reads or writes job.json, or removes the folder
    running.lock    held, shared, by every process that works on the job
    tasks/TASK      held by the process that does a task; free at once when it dies, since the kernel lets go of it.
                    What came of the task is written into it: to have the lock is to see what is in the file, while of
                    another file a network file system may say for a minute that it is not there
    done/TASK       empty: tells without a look at each file which tasks are done
    units/          what the tasks write

Locks are flock's, which work across machines on NFS, GPFS, BeeGFS and on Lustre mounted with `flock`. NFS wants files
that are open for reading and for writing: its shared locks need the one, its exclusive ones the other.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.file_locks import is_at, try_lock
from data_pipeline.preparation.plan import Plan
from data_pipeline.preparation.quarantine import OWNER_ONLY
from data_pipeline.shards import sync_folder, write_atomically

UNFINISHED_NAME = "prepare.unfinished"
VANISHED_PATTERN = f"{UNFINISHED_NAME}.*.tmp"
"""A work folder on its way out."""
FOLDERS = ("tasks", "done", "units")


class VanishedError(Exception):
    """The folder was removed while this process waited for it."""


@dataclass(frozen=True)
class Claim:
    """A task, as who holds its lock sees it."""

    path: Path
    """Of the file that is locked."""
    descriptor: int
    announcement: Path

    @property
    def is_done(self) -> bool:
        content = os.pread(self.descriptor, os.fstat(self.descriptor).st_size, 0)
        try:
            json.loads(content)
        except ValueError:  # nothing yet, or torn by a death: an object that is cut short is no JSON
            return False
        return True

    def finish(self, result: dict[str, Any]) -> None:
        """Keep what came of the task. Everything that it wrote must be on the disk."""
        content = json.dumps(result).encode()
        os.ftruncate(self.descriptor, 0)
        written = 0
        while written < len(content):
            written += os.pwrite(self.descriptor, content[written:], written)
        os.fsync(self.descriptor)
        sync_folder(self.path.parent)

    def announce(self) -> None:
        """Tell the others that the task is done."""
        self.announcement.touch()


@dataclass(frozen=True)
class WorkFolder:
    """Paths, locks and results of the job that writes the data folder `out`."""

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

    def remove_unless_in_use(self) -> None:
        """Remove the folder if no process works on the job. So the last one to leave removes it."""
        with contextlib.suppress(VanishedError), self.planning(), self.alone() as alone:
            if alone:
                self.path.rename(self.path.with_name(VANISHED_PATTERN.replace("*", secrets.token_hex(8))))
        # Only now: where a lock is open here, NFS keeps its file, and with it the folder.
        self.sweep()

    def sweep(self) -> None:
        """Remove what is left of folders whose removal was cut short; what cannot be removed now stays for later."""
        vanished = list(self.out.glob(VANISHED_PATTERN))
        for path in vanished:
            shutil.rmtree(path, ignore_errors=True)
        if vanished:
            sync_folder(self.out)

    def make(self) -> None:
        """Make the folder if it is not there. Raises VanishedError if `out` is removed right then."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError:  # of a corpus of which nothing is left, `out` is removed, too
            raise VanishedError from None

    def begin(self, plan: Plan) -> None:
        """Write down what is to be done, of which nothing is done yet; within `planning`, and `alone`."""
        for entry in list(self.path.iterdir()):
            if entry.is_dir():
                shutil.rmtree(entry)
        for name in FOLDERS:
            (self.path / name).mkdir()
        write_atomically(self.job_path, json.dumps(plan.to_json()).encode(), mode=OWNER_ONLY)

    def read_plan(self) -> Plan:
        """The plan of the job.

        Raises:
            ValueError: it is damaged, or of another version of this program.
        """
        try:
            return Plan.from_json(json.loads(self.job_path.read_bytes()))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.job_path} is damaged ({error}): remove {self.path} and start again") from error

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Wait for the right to read or write job.json; while it is held, the folder is not removed by another.

        Raises:
            VanishedError: the folder is not there, or not any more.
        """
        path = self.path / "job.lock"
        try:
            descriptor = _opened(path)
        except FileNotFoundError:
            raise VanishedError from None
        with _closing(descriptor):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not is_at(descriptor, path):
                raise VanishedError
            yield

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether no process works on the job; to be asked within `planning`."""
        with _closing(_opened(self.path / "running.lock")) as descriptor:
            yield try_lock(descriptor)

    @contextmanager
    def working(self) -> Iterator[None]:
        """What a process holds for as long as it works on the job; to be begun within `planning`, or by the child of
        a process that holds it."""
        with _closing(_opened(self.path / "running.lock")) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield

    @contextmanager
    def claimed(self, task: str) -> Iterator[Claim | None]:
        """Take a task, unless another process has it (then None). It is given back at the end, or by dying."""
        path = self._result_path(task)
        with _closing(_opened(path)) as descriptor:
            yield Claim(path, descriptor, self.path / "done" / task) if try_lock(descriptor) else None

    def tasks_done(self) -> set[str]:
        """The names of all tasks that are done."""
        return {entry.name for entry in os.scandir(self.path / "done")}

    def result(self, task: str) -> dict[str, Any]:
        """What a task that is done has left."""
        result: dict[str, Any] = json.loads(self._result_path(task).read_bytes())
        return result

    def _result_path(self, task: str) -> Path:
        return self.path / "tasks" / task


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


@contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


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
