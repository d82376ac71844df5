"""The lock of a run's folder."""

import errno
import fcntl
import threading
import time
from pathlib import Path

import pytest

from launch.run_folder import SWEEP_NAME, LockedError, check_run, locked
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


def test_what_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nosuch is not a run: there is no such folder"):
        check_run(RunDir(tmp_path / "nosuch"))
    with pytest.raises(ValueError, match="is not a run: config.yaml is missing in it"):
        check_run(RunDir(tmp_path))
    (tmp_path / SWEEP_NAME).touch()
    for point in ("1_seed=1", "0_seed=0"):
        (tmp_path / point).mkdir()
        (tmp_path / point / "config.yaml").touch()
    with pytest.raises(ValueError, match="is a sweep, of several runs: name one of them, such as .*/0_seed=0$"):
        check_run(RunDir(tmp_path))
    check_run(RunDir(tmp_path / "0_seed=0"))
