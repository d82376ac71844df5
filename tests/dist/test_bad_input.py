"""Bad input, from the command line: one clear line on stderr, the right exit code, nothing lost, no traceback."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.folder import newest_checkpoint
from pretrain.checkpoint.index import read_index
from pretrain.run_dir import read_events
from tests.conftest import Corpus, Steppe
from tests.small_disk import mount, unmount

pytestmark = pytest.mark.slow


def one_line(said: str) -> str:
    """The last line, which says what is wrong; no traceback before it."""
    assert "Traceback" not in said
    *_, last = said.strip().splitlines()
    assert last.startswith("steppe: ")
    return last


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.learning_rate=1", "unknown key optimizer.learning_rate"),
        ("batch.global_batch_size=9", "batch.global_batch_size=9 is not a multiple"),
        ("data.sources=[{name: a, path: nowhere}]", "nowhere"),
        ("model.vocab_size=500", "set it to 600"),
        pytest.param(
            "precision=fp16",
            "use bf16 or fp32",
            marks=pytest.mark.skipif(torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="fp16 works here"),
        ),
    ],
)
def test_refused_before_anything_starts(
    steppe: Steppe, corpus: Corpus, tmp_path: Path, override: str, words: str
) -> None:
    done = steppe("train", "58m", "--run-dir", tmp_path / "run", *corpus.settings(override), code=2)
    assert words in one_line(done.stderr)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_exists(steppe: Steppe, corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    done = steppe("train", "58m", "--run-dir", tmp_path, *corpus.settings(), code=2)
    assert "steppe resume" in one_line(done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_an_unknown_recipe_and_a_run_that_is_none(steppe: Steppe, tmp_path: Path) -> None:
    assert "recipes are 125m, 1b, 58m" in one_line(steppe("train", "58n", code=2).stderr)
    assert "is not a run" in one_line(steppe("resume", tmp_path, code=2).stderr)


def test_held_out_data_is_needed_only_where_it_is_asked_for(steppe: Steppe, corpus: Corpus, tmp_path: Path) -> None:
    settings = corpus.settings("evaluation.sources=[{name: none, path: nowhere}]")
    run = ("train", "58m", "--run-dir", tmp_path / "run", *settings, "--stop-after", 1)
    assert "nowhere" in one_line(steppe(*run, code=2).stderr)
    steppe(*run, "--set", "evaluation.every_steps=0")


def test_numbers_out_of_range(steppe: Steppe, corpus: Corpus, tmp_path: Path) -> None:
    run = ("train", "58m", "--run-dir", tmp_path / "run", *corpus.settings())
    assert "--nproc 0" in one_line(steppe(*run, "--nproc", 0, code=2).stderr)
    assert "--stop-after 0" in one_line(steppe(*run, "--stop-after", 0, code=2).stderr)


def test_debug_shows_the_traceback(steppe: Steppe, tmp_path: Path) -> None:
    done = steppe("--debug", "resume", tmp_path, code=2)
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_shard_that_is_not_whole(steppe: Steppe, corpus: Corpus, tmp_path: Path, damage: str) -> None:
    data = Path(shutil.copytree(corpus.train, tmp_path / "data"))
    (shard,) = data.glob("*.bin")
    shard.unlink() if damage == "missing" else os.truncate(shard, 1000)
    settings = corpus.settings(f"data.sources=[{{name: code, path: '{data}'}}]")
    done = steppe("train", "58m", "--run-dir", tmp_path / "run", *settings, code=2)
    assert shard.name in one_line(done.stderr)


def test_a_tokenizer_that_does_not_match(steppe: Steppe, corpus: Corpus, tmp_path: Path) -> None:
    steppe("data", "train-tokenizer", "--input", corpus.text, "--vocab-size", 500, "--out", tmp_path / "other.model")
    other = tmp_path / "data"
    steppe("data", "prepare", "--input", corpus.text, "--tokenizer", tmp_path / "other.model", "--out", other)
    sources = f"data.sources=[{{name: code, path: '{corpus.train}'}}, {{name: other, path: '{other}'}}]"
    done = steppe("train", "58m", "--run-dir", tmp_path / "run", *corpus.settings(sources), code=2)
    assert "different tokenizers" in one_line(done.stderr)


def test_a_folder_whose_tokenizer_was_swapped(steppe: Steppe, corpus: Corpus, tmp_path: Path) -> None:
    data = Path(shutil.copytree(corpus.train, tmp_path / "data"))
    with open(data / "tokenizer.model", "ab") as file:
        file.write(b"x")
    settings = corpus.settings(f"data.sources=[{{name: code, path: '{data}'}}]")
    done = steppe("train", "58m", "--run-dir", tmp_path / "run", *settings, code=2)
    assert "is not the tokenizer that" in one_line(done.stderr)


def test_data_that_does_not_serve(steppe: Steppe, corpus: Corpus, tmp_path: Path) -> None:
    """Too little for one window, and a share that no mixture block can hold."""
    run = ("train", "58m", "--run-dir", tmp_path / "run")
    done = steppe(*run, *corpus.settings("data.sequence_length=1000000"), code=2)
    assert "not one window of data.sequence_length=1000000" in one_line(done.stderr)
    both = f"{{name: a, path: '{corpus.train}'}}, {{name: b, path: '{corpus.held_out}', weight: 1e-6}}"
    done = steppe(*run, *corpus.settings(f"data.sources=[{both}]"), code=2)
    assert "source 'b'" in one_line(done.stderr)
    assert not (tmp_path / "run").exists()


def test_damage_in_held_out_data_ends_all_ranks_before_the_first_step(
    steppe: Steppe, corpus: Corpus, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(corpus.held_out, tmp_path / "damaged"))
    (shard,) = damaged.glob("*.bin")
    shard.write_bytes(b"\xff" + shard.read_bytes()[1:])
    held_out = f"evaluation.sources=[{{name: held-out, path: '{damaged}'}}]"
    run = tmp_path / "run"
    done = steppe("train", "58m", "--nproc", 2, "--run-dir", run, *corpus.settings(held_out), code=2)
    assert f"{shard.name} is damaged in block 0" in one_line(done.stderr)
    assert not read_events(run / "events.jsonl", "step")


def test_a_flipped_bit_stops_all_ranks_together_with_a_checkpoint(
    steppe: Steppe, corpus: Corpus, tmp_path: Path
) -> None:
    """Good data first, then, by a change of mixture, data with one bit wrong: what was learnt is kept."""
    run, damaged = tmp_path / "run", Path(shutil.copytree(corpus.train, tmp_path / "damaged"))
    (shard,) = damaged.glob("*.bin")
    with open(shard, "r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    # Enough good windows before the damaged block is met: the flipped block is one of several.
    steppe("train", "58m", "--nproc", 2, "--run-dir", run, *corpus.settings(), "--stop-after", 3)
    sources = f"data.sources=[{{name: damaged, path: '{damaged}'}}]"
    done = steppe("resume", run, "--set", sources, "--set", "schedule.total_steps=1000", code=2)
    said = one_line(done.stderr)
    assert shard.name in said
    assert "block" in said
    assert "steppe data verify" in said
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    assert 3 <= read_index(newest).step < 1000
    done = steppe("data", "verify", damaged, code=2)
    assert shard.name in one_line(done.stderr)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    disk = tmp_path / "disk"
    mount(disk, megabytes=3)
    yield disk
    unmount(disk)


def test_a_full_disk(steppe: Steppe, corpus: Corpus, small_disk: Path) -> None:
    """The run fails at the checkpoint that does not fit, and resumes from the one before when there is room."""
    run = small_disk / "run"
    model = "model={hidden_size: 64, ffn_size: 96}"  # 1.3 MB a checkpoint
    settings = corpus.settings(model, "checkpoint={every_steps: 2, keep: 2}", "evaluation={every_steps: 0}")
    done = steppe("train", "58m", "--nproc", 2, "--run-dir", run, *settings, code=1)
    assert "could not write the checkpoint" in one_line(done.stderr)
    assert "No space left on device" in one_line(done.stderr)
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    assert f"resumes after step {read_index(newest).step}" in steppe("resume", run).stderr
    assert not list((run / "checkpoints").glob("*.tmp"))


def test_a_folder_with_packages_of_our_names(steppe: Steppe, corpus: Corpus, tmp_path: Path) -> None:
    """Ranks, workers and the command itself find our packages, not those of the folder they start in."""
    for package in ("model", "launch", "pretrain", "data_pipeline"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    settings = [*corpus.settings("evaluation={every_steps: 0}"), "--stop-after", "1"]
    steppe("data", "prepare", "--input", corpus.text, "--tokenizer", corpus.tokenizer, "--out", "data", cwd=tmp_path)
    relative = ["--set", "data.sources=[{name: code, path: data}]"]
    steppe("train", "58m", "--nproc", 2, "--run-dir", "run", *settings, *relative, cwd=tmp_path)
    steppe("resume", tmp_path / "run", "--stop-after", 2, cwd=tmp_path / "model")
    steppe("eval", "run", "--data", corpus.text / "scanner.py", cwd=tmp_path)
