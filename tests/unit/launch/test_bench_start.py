"""`steppe bench start`: every part runs, its phases are there, and what is wrong is said."""

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from launch.bench.app import app
from launch.bench.start import PARTS, PHASES, run
from launch.bench.start_contender import read
from tests.slurm.cluster import wait_for

MODEL = "model={hidden_size: 32, num_layers: 1, num_heads: 2, ffn_size: 64, vocab_size: 1000}"


@pytest.mark.slow
def test_every_part_says_what_it_took(tmp_path: Path) -> None:
    settings = ["--set", MODEL, "--set", "data.sequence_length=32", "--set", "batch.micro_batch_size=2"]
    arguments = ["start", "--rounds", "1", "--ranks", "1", "--resumed", "58m", "--dir", str(tmp_path), "--json"]
    found = CliRunner().invoke(app, [*arguments, *settings])
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert list(result["commands"]["seconds"]) == ["help", "status", "plan"]
    first = result["first_step"]
    assert list(first["phases"]) == list(PHASES)
    assert all(phase["min"] > 0 for phase in first["phases"].values())
    assert sum(first["by_round"][0].values()) == pytest.approx(first["seconds"]["median"])
    assert all(spread["min"] > 0 for spread in result["resume"]["seconds"].values())
    parts = [result[key] for key in ("commands", "first_step", "resume")]
    assert [len(part["targets"]) for part in parts] == [1, 1, 1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True])
def test_an_interrupted_first_step_leaves_nothing(tmp_path: Path, to_all: bool) -> None:
    """Ranks are seen through before the folder of their run goes."""
    words = ["bench", "start", "--part", "first-step", "--recipe", "demo", "--ranks", "1", "--dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    line = [sys.executable, "-P", "-m", "launch.cli", *words]
    with psutil.Popen(line, env=environment, start_new_session=True) as bench:
        try:
            wait_for("a rank at work", lambda: at_work(bench, tmp_path))
            started = bench.children(recursive=True)
            if to_all:  # as a terminal does
                os.killpg(bench.pid, signal.SIGINT)
            else:
                bench.send_signal(signal.SIGINT)
            assert bench.wait(timeout=120) == 130
        finally:
            if bench.poll() is None:
                bench.kill()
    assert not psutil.wait_procs(started, timeout=5)[1]
    assert list(tmp_path.glob("steppe-*")) == []


def at_work(bench: psutil.Popen, folder: Path) -> bool:
    """Whether its run has a rank, which has written something."""
    with suppress(psutil.NoSuchProcess):
        ranks = [child for child in bench.children(recursive=True) if "pretrain.worker" in child.cmdline()]
        return bool(ranks) and any(folder.glob("steppe-bench-*/run_0/logs/*"))
    return False


def test_reading_reads_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What loading is compared with."""
    monkeypatch.setattr("launch.bench.start_contender.READ_BYTES", 100)
    (tmp_path / "file").write_bytes(bytes(range(250)) * 3)
    memory = bytearray(750)
    read(tmp_path / "file", memoryview(memory))
    assert bytes(memory) == bytes(range(250)) * 3


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--part nosuch is none of {', '.join(PARTS)}"):
        run("58m", "58m", 1, 1, ["nosuch"], tmp_path, [])
    with pytest.raises(ValueError, match="nowhere is no folder: make it first"):
        run("58m", "58m", 1, 1, ["commands"], tmp_path / "nowhere", [])
    for recipes in (("nosuch", "58m"), ("58m", "nosuch")):
        with pytest.raises(ValueError, match="nosuch"):
            run(*recipes, 1, 1, list(PARTS), tmp_path, [])
    with pytest.raises(ValueError, match="parallel.tensor=2 .* does not divide 3 ranks"):
        run("58m", "58m", 3, 1, ["first-step"], tmp_path, ["parallel.tensor=2"])
    with pytest.raises(ValueError, match="--ranks 5000: each rank needs a core, and this process may use "):
        run("58m", "58m", 5000, 1, ["first-step"], tmp_path, [])
    with pytest.raises(ValueError, match="--set a.b=1: commands are of no recipe: leave it out, or add a part"):
        run("58m", "58m", 1, 1, ["commands"], tmp_path, ["a.b=1"])
    assert list(tmp_path.iterdir()) == []
