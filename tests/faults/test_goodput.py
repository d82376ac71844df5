"""The goodput of a real run that is killed, resumed, stopped and resumed: every second of it is accounted for."""

import json
from pathlib import Path

import pytest

from pretrain.run_dir import RunDir, read_events
from tests.conftest import Corpus, Steppe
from tests.faults.faulty_run import Fault, faulty

pytestmark = pytest.mark.slow


def test_of_a_run_that_was_killed(steppe: Steppe, corpus: Corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = corpus.settings("checkpoint={every_steps: 4, keep: 1}")
    kill = Fault(0, "open step_00000008.tmp/index.json.tmp", "kill all")
    faulty([kill], "train", "58m", "--nproc", 1, "--run-dir", run, *settings, code=1)
    assert json.loads(steppe("status", run, "--json").stdout)["state"] == "failed"
    steppe("resume", run, "--stop-after", 10)
    steppe("resume", run)
    told = json.loads(steppe("status", run, "--json").stdout)
    goodput, attempts = told["goodput"], told["attempts"]

    events = read_events(RunDir(run).events_path)
    assert goodput["wall_seconds"] == pytest.approx(events[-1]["time"] - events[0]["time"])
    assert sum(goodput["shares"].values()) == pytest.approx(1)
    assert sum(goodput["seconds"].values()) == pytest.approx(goodput["wall_seconds"])
    assert (told["state"], told["step"], goodput["steps_standing"]) == ("done", 12, 12)
    assert goodput["steps_made"] == len([event for event in events if event["type"] == "step"]) > 12
    lost = goodput["steps_made"] - 12
    assert [(row["first_step"], row["last_step"]) for row in attempts] == [(0, 4 + lost), (4, 10), (10, 12)]
    assert [row["ended"] for row in attempts] == ["killed", "done", "done"]
    seconds = goodput["seconds"]
    for account in ("useful", "again", "starting", "validation", "down", "stopped"):
        assert seconds[account] > 0, account
    for account in ("queued", "preflight", "skipped"):
        assert seconds[account] == 0, account
    steps = [event for event in events if event["type"] == "step"]
    assert seconds["useful"] + seconds["again"] + seconds["data"] >= 0.9 * sum(step["step_seconds"] for step in steps)
