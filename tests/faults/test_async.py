"""Saving while training goes on: slow and failing disks, and parameters that change while they are copied."""

from pathlib import Path
from typing import Any

import pytest

from pretrain.run_dir import read_events
from tests.conftest import Corpus
from tests.dist.harness import run_cases
from tests.dist.test_run import curve, weights
from tests.faults.faulty_run import Fault, faulty

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run, but for an error of rank 1's disk in the first save, and a slow disk of rank 0's in the
    second."""
    run = tmp_path_factory.mktemp("runs") / "run"
    faults = [
        Fault(1, "fsync step_00000004.tmp/.*", "fail"),
        Fault(0, "fsync step_00000008.tmp/rank.*", "slow", step=12),
    ]
    faulty(faults, "train", "58m", "--nproc", 2, "--run-dir", run, *corpus.settings(), code=0)
    return run


def happened(run: Path) -> list[str]:
    """What happened in a run: kinds of events and their steps, in order."""
    return [f"{event['type']} {event['step']}" for event in read_events(run / "events.jsonl") if "step" in event]


def event(run: Path, kind: str, step: int) -> dict[str, Any]:
    (found,) = [event for event in read_events(run / "events.jsonl", kind) if event["step"] == step]
    return found


def test_a_save_that_fails_is_told_and_the_run_goes_on(run: Path, undisturbed: Path) -> None:
    order = happened(run)
    assert order.index("step 4") < order.index("checkpoint_failed 4") < order.index("checkpoint 8")
    assert "checkpoint 4" not in order
    message = event(run, "checkpoint_failed", 4)["message"]
    assert message.startswith("rank 1 could not write the checkpoint of step 4: ")
    assert message.endswith("step_00000004.tmp/rank-00001.safetensors: Input/output error")
    assert curve(run) == curve(undisturbed)
    assert weights(run) == weights(undisturbed)


def test_steps_are_made_while_a_save_is_slow(run: Path) -> None:
    """All until the next save, which waits for it: never two at a time."""
    order = happened(run)
    meanwhile = order[order.index("step 8") + 1 : order.index("checkpoint 8")]
    assert [f"step {step}" for step in (9, 10, 11, 12)] == [what for what in meanwhile if what.startswith("step")]
    slow, after = event(run, "checkpoint", 8), event(run, "checkpoint", 12)
    assert 0 < slow["stall_seconds"] < slow["seconds"] / 2
    assert after["stall_seconds"] > 0
    assert order.index("checkpoint 8") < order.index("checkpoint 12")


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of staging_cases.py on two ranks."""
    return run_cases("tests.faults.staging_cases", 2, tmp_path_factory.mktemp("staging"))


@pytest.mark.parametrize("layout", ["zero 1 in bf16", "zero 2 in fp32"])
def test_parameters_that_change_while_they_are_staged(staged: dict[str, Any], layout: str) -> None:
    """The update waits for the copy: an asynchronous save is, in every byte, a blocking one of the same step."""
    result = staged[layout]
    assert result["asynchronous"] == result["blocking"]
    assert result["waited_seconds"] > 0.3


def test_an_update_that_does_not_wait_is_seen(staged: dict[str, Any]) -> None:
    """The same without the guard: so the test above tests something."""
    result = staged["unguarded"]
    assert result["asynchronous"] != result["blocking"]
