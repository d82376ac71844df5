"""The whole rehearsal from the command line: real ranks, real checkpoints, the same numbers as on one rank."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.shrink import STEPS, STOP_AFTER
from pretrain.checkpoint.folder import list_checkpoints
from pretrain.checkpoint.index import read_index
from pretrain.run_dir import RunDir, read_events
from tests.conftest import Corpus, Steppe

STAGES = ["recipe", "data", "full layout", "train", "resume", "evaluate", "as on one rank"]


def check_rehearsed(report: dict[str, Any], folder: Path, ranks: int) -> None:
    """Every stage went well, and the folder holds what they did."""
    assert report["ok"]
    assert [stage["name"] for stage in report["stages"] if stage["ok"]] == STAGES
    run = RunDir(folder / "run")
    assert [event["step"] for event in read_events(run.events_path, "step")] == list(range(1, STEPS + 1))
    assert [event["step"] for event in read_events(run.events_path, "start")] == [0, STOP_AFTER]
    assert {event["ranks"] for event in read_events(run.events_path, "start")} == {ranks}
    assert [event["step"] for event in read_events(run.events_path, "evaluation")] == [STOP_AFTER, STEPS]
    assert [read_index(path).step for path in list_checkpoints(run.checkpoints)] == [STOP_AFTER, STEPS]
    made = (folder / "full_layout.log").read_text().count("made its step")
    assert made == 2


@pytest.mark.slow
def test_a_rehearsal_with_the_recipes_own_data(steppe: Steppe, corpus: Corpus, tmp_path: Path) -> None:
    """Tensor parallelism of 2, of 6 ranks: rehearsed on 4, the layout of 6 with the others faked."""
    folder = tmp_path / "rehearsal"
    settings = corpus.settings(
        "parallel.tensor=2", "precision=fp32", "batch={global_batch_size: 24, micro_batch_size: 4}"
    )
    done = steppe("train", "58m", "--rehearse", "--ranks", 6, "--json", "--run-dir", folder, *settings)
    report = json.loads(done.stdout)
    check_rehearsed(report, folder, ranks=4)
    assert report["data_rehearsed"]
    assert report["layout"]["full"]["world"] == 6
    assert not any(row["setting"] == "model.vocab_size" for row in report["differences"])
    assert "losses within" in report["stages"][-1]["said"]
    assert "limit 1e-05" in report["stages"][-1]["said"]


@pytest.mark.long
def test_a_rehearsal_without_data(steppe: Steppe, tmp_path: Path) -> None:
    """Of 64 ranks, with experts, in bf16; its degrees need 16 ranks, so they are reduced."""
    moe = "{experts: 16, experts_per_token: 2, expert_ffn_size: 1024, first_layer: 1, router: sigmoid, balance: bias}"
    settings = [f"model.moe={moe}", "parallel={tensor: 4, sequence: 2, expert: 16, activation_checkpointing: full}"]
    words = [word for setting in settings for word in ("--set", setting)]
    folder = tmp_path / "rehearsal"
    done = steppe("train", "1b", "--rehearse", "--nodes", 8, "--json", "--run-dir", folder, *words, cwd=tmp_path)
    report = json.loads(done.stdout)
    check_rehearsed(report, folder, ranks=8)
    assert not report["data_rehearsed"]
    assert any("Parallelism at full degree" in line for line in report["not_rehearsed"])


@pytest.mark.slow
def test_a_stage_that_fails_is_told_and_its_folder_kept(steppe: Steppe, corpus: Corpus, tmp_path: Path) -> None:
    """A damaged shard: the user's mistake, which shows when ranks read it."""
    data = tmp_path / "data"
    data.mkdir()
    for path in corpus.train.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    shard = next(data.glob("*.bin"))
    shard.write_bytes(bytes(shard.stat().st_size))
    settings = corpus.settings(f"data.sources=[{{name: code, path: '{data}'}}]")
    done = steppe("train", "58m", "--rehearse", "--run-dir", tmp_path / "rehearsal", *settings, code=2)
    assert "The rehearsal failed at: train." in done.stdout
    assert str(tmp_path / "rehearsal") in done.stdout
    assert "rehearsing a run of 1 rank, the fewest that hold its degrees" in done.stderr


def test_an_impossible_run_ends_at_once(steppe: Steppe, tmp_path: Path) -> None:
    folder = tmp_path / "rehearsal"
    words = ("--rehearse", "--nodes", 64, "--set", "parallel.tensor=16", "--set", "model.num_kv_heads=64")
    done = steppe("train", "70b", *words, "--set", "model.ffn_size=28680", "--run-dir", folder, code=2)
    assert done.stderr.strip() == (
        "steppe: parallel.tensor=16 does not divide model.ffn_size=28680: use one of 1, 2, 4, 8"
    )
    assert done.stdout == ""
    assert not folder.exists()
