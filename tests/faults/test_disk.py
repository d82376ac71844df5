"""Disks that are full or cannot be written to, under runs of the command line."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.folder import newest_checkpoint
from pretrain.checkpoint.index import read_index
from pretrain.checkpoint.read import read_weights
from pretrain.run_dir import read_events
from tests.conftest import Corpus, Steppe, command, environment
from tests.dist.test_bad_input import one_line
from tests.faults.states import names_in
from tests.small_disk import mount, unmount

pytestmark = pytest.mark.slow
SECONDS = 120  # for a run to come to something, on a busy machine
LEFT_BYTES = 100_000  # of a full disk: less than a rank's file


class Disk:
    """A small file system: 20 MB, mounted at a folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.ballast = path, path / "ballast"

    def fill(self) -> None:
        """Leave next to nothing."""
        free = os.statvfs(self.path).f_bavail * os.statvfs(self.path).f_frsize
        with open(self.ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - LEFT_BYTES)

    def make_room(self) -> None:
        self.ballast.unlink()

    def remount(self, how: str) -> None:
        """how: `ro` or `rw`."""
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.path)], check=True)


@pytest.fixture
def mounted() -> Iterator[Callable[[Path], Disk]]:
    """Mount a small file system at a folder, for as long as the test takes."""
    paths = []

    def mounted_at(path: Path) -> Disk:
        mount(path, megabytes=20)
        paths.append(path)
        return Disk(path)

    yield mounted_at
    for path in paths:
        unmount(path)


def await_event(run: Path, kind: str, after: int, process: "subprocess.Popen[str]") -> dict[str, Any]:
    """The first event of a kind of a step later than `after`."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        events = read_events(run / "events.jsonl", kind) if (run / "events.jsonl").exists() else []
        for event in events:
            if event["step"] > after:
                return event
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.01)
    raise AssertionError(f"no {kind} event after step {after}")


@pytest.fixture
def run(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of the undisturbed run without its checkpoints."""
    return Path(shutil.copytree(undisturbed, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))


@pytest.fixture
def disk(run: Path, undisturbed: Path, mounted: Callable[[Path], Disk]) -> Disk:
    """A small one under its checkpoints alone; what else it writes goes elsewhere."""
    disk = mounted(run / "checkpoints")
    shutil.copytree(undisturbed / "checkpoints", disk.path, dirs_exist_ok=True)
    return disk


@pytest.fixture
def running(run: Path, disk: Disk) -> Iterator["subprocess.Popen[str]"]:
    """The run goes on without an end, and saves every second step."""
    settings = ("schedule.total_steps=100000", "checkpoint={every_steps: 2, keep: 1}", "evaluation.every_steps=0")
    words = ("resume", run, *(word for setting in settings for word in ("--set", setting)))
    process = subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True, env=environment())
    yield process
    process.terminate()
    process.communicate()


def test_a_disk_that_is_full_for_a_while(
    run: Path, disk: Disk, running: "subprocess.Popen[str]", steppe: Steppe
) -> None:
    """Training goes on with the older checkpoint, and saves again when there is room. Full at the end, the run fails in
    one line, and resumes from what there is."""
    checkpoints = disk.path
    saved = await_event(run, "checkpoint", 12, running)
    disk.fill()
    failed = await_event(run, "checkpoint_failed", saved["step"], running)
    assert str(checkpoints) in failed["message"]
    assert "No space left on device" in failed["message"]
    await_event(run, "step", failed["step"] + 1, running)
    older = newest_checkpoint(checkpoints)
    assert older is not None
    read_weights(older)
    disk.make_room()
    again = await_event(run, "checkpoint", failed["step"], running)
    disk.fill()
    await_event(run, "checkpoint_failed", again["step"], running)
    running.terminate()
    _, said = running.communicate(timeout=SECONDS)
    assert running.returncode == 1, said
    assert str(checkpoints) in one_line(said)
    assert "No space left on device" in one_line(said)
    newest = newest_checkpoint(checkpoints)
    assert newest is not None
    step = read_index(newest).step
    assert step >= again["step"]
    disk.make_room()
    done = steppe("resume", run, "--stop-after", step + 1)
    assert f"resumes after step {step} from" in done.stderr
    assert names_in(checkpoints) == ["latest", f"step_{step + 1:08d}"]


def test_a_folder_that_cannot_be_written_to(
    mounted: Callable[[Path], Disk], undisturbed: Path, steppe: Steppe, corpus: Corpus, tmp_path: Path
) -> None:
    """Refused in one line; whole afterwards."""
    disk = mounted(tmp_path / "disk")
    run = Path(shutil.copytree(undisturbed, disk.path / "run"))
    before = names_in(run)
    disk.remount("ro")
    try:
        done = steppe("resume", run, "--set", "schedule.total_steps=14", code=2)
        assert "Read-only file system" in one_line(done.stderr)
        assert str(run) in one_line(done.stderr)
        assert "starting" not in done.stderr
        done = steppe("train", "58m", "--run-dir", disk.path / "new", *corpus.settings(), code=2)
        assert one_line(done.stderr) == f"steppe: {disk.path / 'new'}: Read-only file system"
    finally:
        disk.remount("rw")
    assert names_in(run) == before
    assert "resumes after step 12" in steppe("resume", run, "--set", "schedule.total_steps=13").stderr
