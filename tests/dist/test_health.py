"""A run that meets bad data goes back and leaves it out; it equals the run that has never read it."""

import random
import subprocess
import time
from pathlib import Path

import pytest

from pretrain.checkpoint.folder import list_checkpoints
from pretrain.checkpoint.index import read_index
from pretrain.run_dir import RunDir, read_events
from tests.conftest import Steppe, command, environment
from tests.dist.test_run import curve, weights

pytestmark = pytest.mark.slow
STEPS = 40


@pytest.fixture(scope="module")
def settings(steppe: Steppe, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run on plain sentences, with some pages of noise among them. Windows stay in the order of the text but for
    blocks of a batch, so that the noise comes together."""
    folder = tmp_path_factory.mktemp("noisy")
    noise, text = random.Random(1), folder / "text"
    text.mkdir()
    for part in range(12):
        sentences = "".join(f"{noise.choice('abcd')} cat sat on the {noise.choice('xyz')} mat.\n" for _ in range(150))
        (text / f"{part:02}.txt").write_text(sentences)
    (text / "06_noise.txt").write_text("".join(noise.choices("abcdefghijklmnopqrstuvwxyz .\n", k=2500)))
    steppe("data", "train-tokenizer", "--input", text, "--vocab-size", 320, "--out", folder / "tokenizer.model")
    steppe("data", "prepare", "--input", text, "--tokenizer", folder / "tokenizer.model", "--out", folder / "tokens")
    chosen = [
        "model={hidden_size: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, ffn_size: 48, vocab_size: 320}",
        f"data={{sequence_length: 32, sources: [{{name: noisy, path: '{folder / 'tokens'}'}}], "
        "shuffle_block_bytes: 512, shuffle_group_blocks: 1}",
        "batch={global_batch_size: 8, micro_batch_size: 4}",
        "optimizer.lr=1e-2",
        f"schedule={{warmup_steps: 2, total_steps: {STEPS}}}",
        "checkpoint={every_steps: 5, keep: 100}",
        "evaluation={every_steps: 0}",
        "health={spike_zscore: 8, spike_window: 16}",
    ]
    return [word for setting in chosen for word in ("--set", setting)]


def test_a_spike_is_undone_and_its_data_left_out(steppe: Steppe, settings: list[str], tmp_path: Path) -> None:
    spiked, told = tmp_path / "spiked", tmp_path / "told"
    steppe("train", "58m", "--nproc", 2, "--run-dir", spiked, *settings, "--stop-after", 37)
    said = steppe("resume", spiked).stderr
    rewinds = read_events(RunDir(spiked).events_path, "rewind")
    assert rewinds, said
    first = rewinds[0]
    assert first["left_out"] == [8 * first["to_step"], 8 * (first["step"] + 1)]  # batches of 8, and one more
    for event in rewinds:
        assert event["zscore"] > 8
        assert event["checkpoint"].endswith(f"step_{event['to_step']:08}")
    newest = read_index(list_checkpoints(RunDir(spiked).checkpoints)[-1])
    assert newest.trainer is not None
    left_out = newest.trainer["left_out"]
    assert left_out[-1] == rewinds[-1]["left_out"]

    steppe("train", "58m", "--nproc", 2, "--run-dir", told, *settings, "--set", f"skips.data={left_out}")
    assert read_events(RunDir(told).events_path, "rewind") == []
    assert read_events(RunDir(told).events_path, "left_out")[0]["ranges"] == left_out
    assert [step[0] for step in curve(told)] == list(range(1, STEPS + 1))
    assert curve(spiked) == curve(told)
    assert weights(spiked) == weights(told)


def test_a_loss_that_spikes_again_and_again_ends_the_run(steppe: Steppe, settings: list[str], tmp_path: Path) -> None:
    """A learning rate that makes it jump, wherever it goes back to."""
    run = tmp_path / "run"
    wild = ["--set", "health={spike_zscore: 0.5, max_rewinds: 2}", "--set", "optimizer={lr: 0.5, grad_clip: 0}"]
    said = steppe("train", "58m", "--nproc", 1, "--run-dir", run, *settings, *wild, code=1).stderr
    assert "the loss has spiked 3 times since the checkpoint of step" in said
    assert "health.max_rewinds=2" in said


def test_updates_can_be_left_out(steppe: Steppe, settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--set", "health.spike_zscore=0", "--set", "skips.updates=[2, 4]", "--stop-after", 6]
    steppe("train", "58m", "--nproc", 1, "--run-dir", run, *settings, *words)
    assert [event["skipped"] for event in read_events(RunDir(run).events_path, "step")] == [
        step in (2, 4) for step in range(1, 7)
    ]
    newest = read_index(list_checkpoints(RunDir(run).checkpoints)[-1])
    assert newest.engine is not None
    assert newest.engine["optimizer_steps"] == 4


def test_a_checkpoint_now_and_an_end_by_files(steppe: Steppe, settings: list[str], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    quiet = ["--set", "checkpoint.every_steps=0", "--set", "health.spike_zscore=0"]
    steppe("train", "58m", "--nproc", 2, "--run-dir", run.path, *settings, *quiet, "--stop-after", 1)
    run.save_path.touch()
    steppe("resume", run.path, "--stop-after", 3)
    assert [event["step"] for event in read_events(run.events_path, "checkpoint")] == [1, 2, 3]
    assert not run.save_path.exists()
    run.stop_path.touch()
    steppe("resume", run.path, "--stop-after", 4)  # who resumes does not want it to stop
    assert not run.stop_path.exists()
    long = command("resume", run.path, "--set", "schedule.total_steps=100000")  # the file is looked for now and then
    with subprocess.Popen(long, env=environment(), stderr=subprocess.PIPE, text=True) as going:
        while read_events(run.events_path, "step")[-1]["step"] < 5:
            time.sleep(0.05)
        run.stop_path.touch()
        _, said = going.communicate(timeout=200)
    assert going.returncode == 75, said
    assert "stopped on request" in said
    assert run.stop_path.exists()
