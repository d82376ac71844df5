"""A run whose mixture, sequence length and batch size change on the way: told from the start, or on the way."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.folder import newest_checkpoint
from pretrain.checkpoint.index import read_index
from pretrain.run_dir import RunDir, read_events
from tests.conftest import Corpus, Steppe

pytestmark = pytest.mark.slow

EXACT = ("loss", "grad_norm", "lr", "tokens", "position")
STAGES = "data.stages=[{from_step: 4, weights: {more: 1}, sequence_length: 64}, {from_step: 7, global_batch_size: 4}]"


def settings(corpus: Corpus, *overrides: str) -> list[str]:
    sources = f"[{{name: code, path: '{corpus.train}', weight: 3}}, {{name: more, path: '{corpus.held_out}'}}]"
    return corpus.settings(f"data.sources={sources}", "evaluation.every_steps=0", *overrides)


def curve(run: Path) -> list[list[Any]]:
    return [[event[key] for key in EXACT] for event in read_events(RunDir(run).events_path, "step")]


@pytest.fixture(scope="module")
def told_at_the_start(steppe: Steppe, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("stages") / "told"
    steppe("train", "58m", "--nproc", 2, "--run-dir", run, *settings(corpus, STAGES))
    return run


def test_stages_begin_where_the_config_says(told_at_the_start: Path) -> None:
    run = RunDir(told_at_the_start)
    stages = read_events(run.events_path, "stage")
    assert [(stage["step"], stage["position"]) for stage in stages] == [(0, 0), (4, 32), (7, 56)]
    assert [stage["sequence_length"] for stage in stages] == [32, 64, 64]
    steps = read_events(run.events_path, "step")
    assert [step["tokens_in_step"] for step in steps] == [8 * 32] * 4 + [8 * 64] * 3 + [4 * 64] * 5
    newest = newest_checkpoint(run.checkpoints)
    assert newest is not None
    assert read_index(newest).sequence_length == 64


def test_mixed_on_the_way_it_is_the_same_run(
    told_at_the_start: Path, steppe: Steppe, corpus: Corpus, tmp_path: Path
) -> None:
    """Stopped, given its stages, resumed on another number of ranks, stopped in a stage, resumed: the same samples."""
    run = tmp_path / "mixed"
    steppe("train", "58m", "--nproc", 2, "--run-dir", run, *settings(corpus), "--stop-after", 2)
    steppe("data", "mix", run, "--at-step", 4, "--set", "weights={code: null}", "--set", "sequence_length=64")
    steppe("data", "mix", run, "--at-step", 7, "--set", "global_batch_size=4")
    assert (
        "lies behind the newest checkpoint"
        in steppe("data", "mix", run, "--at-step", 1, "--set", "weights.code=2", code=2).stderr
    )
    steppe("resume", run, "--stop-after", 5)
    steppe("resume", run)
    assert curve(run) == curve(told_at_the_start)


def test_the_ledger_knows_every_step(told_at_the_start: Path, steppe: Steppe) -> None:
    """Whatever was trained, what it counts is what the positions say, before the first step and after the last."""
    position = 0
    for step, T, size in ((1, 32, 8), (5, 64, 8), (8, 64, 4), (12, 64, 4), (40, 64, 4)):
        told = json.loads(steppe("data", "show", told_at_the_start, "--step", step, "--json").stdout)
        assert (told["sequence_length"], told["samples"]) == (T, size)
        assert told["position"] > position or step == 1
        position = told["position"]
    events = read_events(RunDir(told_at_the_start).events_path, "step")
    consumed = json.loads(steppe("data", "consumed", told_at_the_start, "--json").stdout)
    assert (consumed["now"]["step"], consumed["now"]["position"]) == (12, events[-1]["position"])
    read = sum(source["tokens"] for source in consumed["now"]["sources"].values())
    assert events[-1]["tokens"] - 64 <= read <= events[-1]["tokens"]  # a window at a block's end may be short
