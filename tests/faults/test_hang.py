"""Ranks that hang, in runs of the command line: named within their time, ended, and resumed as if nothing had been."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pretrain.hang import HANG
from pretrain.run_dir import RunDir, read_events, read_json
from tests.conftest import Corpus, Steppe
from tests.dist.test_bad_input import one_line
from tests.dist.test_run import curve, weights
from tests.faults.faulty_run import Fault, faulty

pytestmark = pytest.mark.slow
HANG_SECONDS = 6
DEADLINE_SECONDS = HANG_SECONDS + 12  # from the last step to the end of the command, on a busy machine
STEP = 7


@pytest.fixture
def nobody_left(tmp_path: Path) -> Iterator[None]:
    """No process of the run stays behind: no rank, and no watchdog."""

    def left() -> list[list[str]]:
        found = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        return [words for words in found if any(word.startswith(str(tmp_path)) for word in words)]

    yield
    deadline = time.monotonic() + 10
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left()


@pytest.mark.usefixtures("nobody_left")
@pytest.mark.parametrize(
    ("what", "state", "stacks_say"),
    [
        pytest.param("stop", "stopped (state T)", "in befall", id="SIGSTOP"),
        pytest.param("sleep", "", "in befall", id="in Python"),
        pytest.param("hold", "", "in match", id="in C, holding the lock", marks=pytest.mark.long),
        pytest.param("uninterruptible", "(state D)", "kernel_clone", id="in the kernel", marks=pytest.mark.long),
    ],
)
def test_a_rank_that_hangs(
    undisturbed: Path, steppe: Steppe, corpus: Corpus, tmp_path: Path, what: str, state: str, stacks_say: str
) -> None:
    run = RunDir(tmp_path / "run")
    settings = corpus.settings(f"health.hang_seconds={HANG_SECONDS}", "checkpoint.asynchronous=false")
    fault = Fault(1, f"step {STEP}", what)  # type: ignore[arg-type]
    try:
        said = faulty([fault], "train", "58m", "--nproc", 2, "--run-dir", run.path, *settings, code=1)
    finally:
        release(run.path / "fifo")
    took = time.time() - read_events(run.events_path, "step")[-1]["time"]

    line = one_line(said)
    assert "rank 1 on " in line
    assert f" is late, at step {STEP} (step), in train (pretrain/train.py:" in line or what == "uninterruptible"
    assert state in line
    assert "; the others wait for it in all_reduce; stacks in " in line
    assert line.endswith(f"; go on with: steppe resume {run.path}")
    assert read_json(run.outcome_path)["exit_code"] == 1
    assert HANG_SECONDS < took < DEADLINE_SECONDS
    errors = [read_json(run.rank_error(rank)) for rank in (0, 1)]
    assert [error["type"] for error in errors] == [HANG, HANG]
    assert [error["waiting"] for error in errors] == ["all_reduce", None]
    assert "in all_reduce" in run.rank_stacks(0).read_text()
    assert stacks_say in run.rank_stacks(1).read_text()

    patient = ("--set", "health.hang_seconds=1800")  # with a busy machine
    assert "resumes after step 4 from" in steppe("resume", run.path, *patient).stderr
    assert curve(run.path) == curve(undisturbed)
    assert weights(run.path) == weights(undisturbed)
    assert not list(run.logs.glob("*.stacks"))


def release(fifo: Path) -> None:
    """Let a process go that waits for someone to write into a pipe, if any does."""
    try:
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:  # nobody waits
        return
