"""The command line as tests call it, and a small prepared corpus, made by it once for each process of tests."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

# A slow machine is no counterexample.
hypothesis.settings.register_profile("steppe", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("steppe")

Steppe = Callable[..., "subprocess.CompletedProcess[str]"]
STDLIB = Path(json.__file__).parent.parent


def command(*words: object) -> list[str]:
    """`steppe words...` as a process's arguments."""
    return [sys.executable, "-P", "-m", "launch.cli", *map(str, words)]


def environment() -> dict[str, str]:
    """One thread a process: tests run several, and a small model gains nothing from more."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def steppe() -> Steppe:
    """Run a command to its end; `code` is the exit code it must have."""

    def run(*words: object, code: int = 0, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            command(*words), capture_output=True, text=True, env=environment(), cwd=cwd, timeout=300, check=False
        )
        assert done.returncode == code, f"exit code {done.returncode}, not {code}: {done.stdout}\n{done.stderr}"
        return done

    return run


@dataclass(frozen=True)
class Corpus:
    """Folders of a prepared corpus, and the settings that make a small run read it."""

    tokenizer: Path
    train: Path
    held_out: Path
    text: Path

    def settings(self, *overrides: str) -> list[str]:
        """`--set` words of a small run: 10 thousand parameters, 12 steps."""
        settings = [
            "model={hidden_size: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, ffn_size: 48, vocab_size: 600}",
            f"data={{sequence_length: 32, sources: [{{name: code, path: '{self.train}'}}]}}",
            "batch={global_batch_size: 8, micro_batch_size: 2}",
            "optimizer.lr=1e-2",
            "schedule={warmup_steps: 2, total_steps: 12}",
            "checkpoint={every_steps: 4, keep: 2}",
            f"evaluation={{every_steps: 6, windows: 7, sources: [{{name: held-out, path: '{self.held_out}'}}]}}",
            *overrides,
        ]
        return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture(scope="session")
def corpus(steppe: Steppe, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two packages of the standard library, one to train on and one held out."""
    folder = tmp_path_factory.mktemp("corpus")
    made = Corpus(folder / "tokenizer.model", folder / "train", folder / "held_out", STDLIB / "json")
    steppe("data", "train-tokenizer", "--input", STDLIB / "email", "--vocab-size", 600, "--out", made.tokenizer)
    for text, out in ((STDLIB / "email", made.train), (STDLIB / "json", made.held_out)):
        steppe("data", "prepare", "--input", text, "--tokenizer", made.tokenizer, "--out", out)
    return made
