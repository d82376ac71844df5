"""What a run says of a rank that is slow, a disk that will be full, memory that does not suffice."""

from pathlib import Path

import pytest

from pretrain.recipe import load_config
from pretrain.run_dir import RunDir, read_events, read_json
from tests.conftest import Corpus, Steppe
from tests.dist.test_bad_input import one_line
from tests.faults.faulty_run import Fault, faulty
from tests.small_disk import mount, unmount

pytestmark = pytest.mark.slow


def test_a_slow_rank_is_named_once(corpus: Corpus, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    settings = corpus.settings("health.straggler_every_steps=3", "evaluation.every_steps=0")
    said = faulty([Fault(1, "forward", "drag")], "train", "58m", "--nproc", 2, "--run-dir", run.path, *settings, code=0)
    assert "is slow: its forward passes take" in said
    (event,) = read_events(run.events_path, "straggler")
    assert (event["step"], event["rank"]) == (6, 1)  # at the second look
    assert event["ratio"] > load_config(run.config_path).health.straggler_ratio
    assert event["host"] == read_json(run.environment_path)["host"]


def test_a_disk_that_will_be_full_is_announced(steppe: Steppe, corpus: Corpus, tmp_path: Path) -> None:
    """It holds what this short run saves, but not what it would keep."""
    disk = tmp_path / "disk"
    mount(disk, megabytes=6)
    try:
        run = RunDir(disk / "run")
        settings = corpus.settings("checkpoint={every_steps: 4, keep: 100}", "evaluation.every_steps=0")
        said = steppe("train", "58m", "--nproc", 2, "--run-dir", run.path, *settings).stderr
        (event,) = read_events(run.events_path, "disk_low")
        assert event["free_bytes"] < event["needed_bytes"]
        saved = read_events(run.events_path, "checkpoint")
        assert event["time"] < saved[0]["time"]
        assert saved[-1]["step"] == 12
        assert said.count("is nearly full") == 1
    finally:
        unmount(disk)


def test_memory_that_does_not_suffice(steppe: Steppe, corpus: Corpus, tmp_path: Path) -> None:
    """A model of more than any machine has."""
    settings = corpus.settings("model.ffn_size=10000000000000")
    said = steppe("train", "58m", "--nproc", 2, "--run-dir", tmp_path / "run", *settings, code=1).stderr
    assert "OutOfMemory: " in one_line(said)
    assert "a smaller batch.micro_batch_size (now 2)" in one_line(said)
