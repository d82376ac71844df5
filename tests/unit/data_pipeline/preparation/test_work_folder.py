"""Locks, results and removal of the folder in which a preparation is worked on."""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.corpus.config import corpus_of
from data_pipeline.preparation.plan import Plan, make_plan
from data_pipeline.preparation.work_folder import VanishedError, WorkFolder
from tests.unit.data_pipeline.locks import ask_as_nfs_does


@pytest.fixture
def plan() -> Plan:
    return make_plan(corpus_of([__file__]), "abc", 1000)


@pytest.fixture
def work(plan: Plan, tmp_path: Path) -> WorkFolder:
    work = WorkFolder(tmp_path / "out")
    work.make()
    work.begin(plan)
    return work


def test_locks_are_such_as_nfs_grants(work: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_as_nfs_does(monkeypatch)
    with work.planning(), work.alone() as alone:
        assert alone
    with work.working(), work.alone() as alone:
        assert not alone
    with work.claimed("read-000000") as claim, work.claimed("read-000000") as other:
        assert claim is not None
        assert other is None


def test_who_has_the_lock_sees_what_came_of_the_task(work: WorkFolder) -> None:
    """Whatever the file system says of other files, as NFS does for a while after a look that found nothing."""
    with work.claimed("read-000000") as claim:
        assert claim is not None
        assert not claim.is_done
        claim.finish({"shards": 3})
        # Here it dies, without a word to the others.
    assert work.tasks_done() == set()
    with work.claimed("read-000000") as claim:
        assert claim is not None
        assert claim.is_done
        claim.announce()
    assert work.tasks_done() == {"read-000000"}
    assert work.result("read-000000") == {"shards": 3}


@pytest.mark.parametrize("torn", [b"", b'{"shards": ', b"\0\0\0"])
def test_a_torn_result_is_none(torn: bytes, work: WorkFolder) -> None:
    (work.path / "tasks" / "read-000000").write_bytes(torn)
    with work.claimed("read-000000") as claim:
        assert claim is not None
        assert not claim.is_done
        claim.finish({})
        assert claim.is_done
    assert work.result("read-000000") == {}


def test_the_plan_is_for_its_owner_and_begins_with_nothing(work: WorkFolder, plan: Plan) -> None:
    """It may hold signed URLs."""
    assert stat.S_IMODE(work.job_path.stat().st_mode) == 0o600
    for folder in (work.unit_path(0), work.duplicates_path, work.contamination_path):
        folder.mkdir()
    with work.claimed("read-000000") as claim:
        assert claim is not None
        claim.finish({})
        claim.announce()
    work.begin(plan)
    assert {path.name for path in work.path.iterdir() if path.is_dir()} == {"tasks", "done", "units"}
    assert work.tasks_done() == set()
    assert work.read_plan() == plan


def test_the_last_one_removes_the_folder(work: WorkFolder) -> None:
    with work.working():
        work.remove_unless_in_use()
        assert work.job_path.exists()
    work.remove_unless_in_use()
    assert list(work.out.iterdir()) == []
    work.remove_unless_in_use()
    with pytest.raises(VanishedError), work.planning():
        pass


def test_who_waited_for_a_folder_that_was_removed_is_told(work: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock is that of a file that is gone, of which another process may have made another by now."""
    flock = fcntl.flock

    def remove_first(descriptor: int, kind: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        work.remove_unless_in_use()
        work.make()
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with pytest.raises(VanishedError), work.planning():
        pass


def test_no_file_is_open_in_a_folder_that_is_removed(work: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS keeps a file that is open under another name, and so the folder."""
    rmtree, removed = shutil.rmtree, []

    def remove(path: Path, **options: Any) -> None:
        for descriptor in os.listdir("/proc/self/fd"):
            link = Path("/proc/self/fd", descriptor)
            assert not (link.is_symlink() and os.readlink(link).startswith(f"{path}/"))
        removed.append(path)
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", remove)
    work.remove_unless_in_use()
    assert len(removed) == 1


def test_what_cannot_be_removed_now_is_removed_later(work: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink: Callable[..., None] = os.unlink

    def busy(path: str, **options: Any) -> None:
        if str(path).endswith("running.lock"):
            raise OSError(errno.EBUSY, "device or resource busy")
        unlink(path, **options)

    with work.planning(), work.alone():
        pass
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", busy)
        work.remove_unless_in_use()
    assert len(list(work.out.iterdir())) == 1
    work.sweep()
    assert list(work.out.iterdir()) == []
