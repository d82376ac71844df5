"""The lock of a run's folder."""

import errno
import fcntl
import threading
import time
from pathlib import Path

import pytest

from launch.run_folder import LockedError, locked
from pretrain.run_dir import RunDir


def test_one_at_a_time(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with locked(run), pytest.raises(LockedError, match="is being trained in by another process"), locked(run):
        pass
    with locked(run):
        pass


def test_ranks_that_are_left_hold_it_too(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with open(run.ranks_lock_path, "w") as ranks:
        fcntl.flock(ranks, fcntl.LOCK_SH)
        with pytest.raises(LockedError), locked(run):
            pass
    with locked(run):
        pass


def test_patience(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    ranks = open(run.ranks_lock_path, "w")  # noqa: SIM115
    fcntl.flock(ranks, fcntl.LOCK_SH)
    threading.Timer(0.3, ranks.close).start()
    started = time.monotonic()
    with locked(run, patience_seconds=20.0):
        assert 0.3 <= time.monotonic() - started < 10.0


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="No locks available: the file system must have locks"), locked(RunDir(tmp_path)):
        pass
