"""`steppe demo`: the whole road on text that every machine with Python has, by the commands that a user would type.

The text is the interpreter's own standard library, split by module: whole modules are held out, so that no held-out
file has a sibling in training.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from rich.console import Console
from rich.table import Table

MARKER = ".steppe-demo"
HELD_OUT_SHARE = 20  # one module in so many
# Tests are half of the library and unlike the rest; the others are not its text.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
PROMPT = "class Stack:\n    def __init__(self):\n"


def library_sources(library: Path) -> list[Path]:
    """The sources of Python's standard library that make good text."""
    return [path for path in sorted(library.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(library).parts)]


@dataclass
class Demo:
    """One run of the demo in a folder of its own."""

    folder: Path
    steps: int
    nproc: int
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))

    def run(self) -> list[tuple[str, str, float]]:
        """Every stage in turn; rows of (stage, what came of it, seconds)."""
        stages: dict[str, Callable[[], str]] = {
            "text": self.collect_text,
            "tokenizer": self.train_tokenizer,
            "shards": self.prepare,
            "train": self.train,
            "resume": self.resume,
            "evaluate": self.evaluate,
            "generate": self.generate,
        }
        rows = []
        for name, act in stages.items():
            self.console.rule(f"[bold]{name}", align="left")
            started = time.monotonic()
            rows.append((name, act(), time.monotonic() - started))
        return rows

    # Each stage returns its line for the table.

    def collect_text(self) -> str:
        library = Path(sysconfig.get_paths()["stdlib"])
        counts, size = {"train": 0, "held_out": 0}, 0
        for source in library_sources(library):
            inside = source.relative_to(library)
            part = "held_out" if xxhash.xxh3_64_intdigest(inside.parts[0].encode()) % HELD_OUT_SHARE == 0 else "train"
            target = self.folder / "text" / part / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            counts[part] += 1
            size += source.stat().st_size
        if not all(counts.values()):
            raise ValueError(f"{library} holds no standard library sources: run the demo with a Python that has them")
        said = f"{size / 1e6:.1f} MB of {library.name} sources: {counts['train']} files, {counts['held_out']} held out"
        self.console.print(said)
        return said

    def train_tokenizer(self) -> str:
        out = self.folder / "tokenizer.model"
        text = self.folder / "text" / "train"
        self.steppe("data", "train-tokenizer", "--input", text, "--vocab-size", "8192", "--out", out)
        return f"8,192 pieces, {out}"

    def prepare(self) -> str:
        told = []
        for part in ("train", "held_out"):
            words = ("--tokenizer", self.folder / "tokenizer.model", "--out", self.folder / "data" / part)
            manifest = self.steppe("data", "prepare", "--input", self.folder / "text" / part, *words, "--json")
            told.append(f"{manifest['tokens']:,} tokens {part.replace('_', ' ')}")
        return ", ".join(told)

    def train(self) -> str:
        sources = f"data.sources=[{{name: stdlib, path: '{self.folder / 'data' / 'train'}'}}]"
        held_out = f"evaluation.sources=[{{name: held-out, path: '{self.folder / 'data' / 'held_out'}'}}]"
        # Lengths and cadence as the recipe's, in proportion, should a shorter demo be asked for.
        half = self.steps // 2
        schedule = f"schedule={{total_steps: {self.steps}, warmup_steps: {self.steps // 10}}}"
        cadence = ["--set", f"checkpoint.every_steps={half}", "--set", f"evaluation.every_steps={half}"]
        settings = ["--set", sources, "--set", held_out, "--set", schedule, *cadence]
        self.steppe("train", "demo", "--nproc", self.nproc, "--run-dir", self.run_dir, *settings, "--stop-after", half)
        return f"{half} of {self.steps} steps on {self.nproc} ranks, loss {self.last_step()['loss']:.3f}"

    def resume(self) -> str:
        self.steppe("resume", self.run_dir)
        last = self.last_step()
        speed = f"{last['tokens_per_second']:,.0f} tokens/s, MFU {last['mfu']:.0%}"
        return f"to step {last['step']}, loss {last['loss']:.3f}, {speed}"

    def evaluate(self) -> str:
        result = self.steppe("eval", self.run_dir, "--data", f"held-out={self.folder / 'text' / 'held_out'}", "--json")
        said = (
            f"perplexity {result['perplexity']:.2f}, {result['bits_per_byte']:.3f} bits per byte on "
            f"{result['bytes'] / 1e6:.2f} MB that it never saw"
        )
        self.console.print(said)
        return said

    def generate(self) -> str:
        result = self.steppe("generate", self.run_dir, "--prompt", PROMPT, "--max-new-tokens", "48", "--json")
        self.console.print(PROMPT + result["text"], markup=False, soft_wrap=True)
        return f"{len(result['text'].splitlines())} lines of code after a prompt of {len(PROMPT.splitlines())}"

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def last_step(self) -> dict[str, Any]:
        """The newest step event of the run."""
        from pretrain.run_dir import RunDir, read_events

        return read_events(RunDir(self.run_dir).events_path, "step")[-1]

    def steppe(self, *words: Any) -> Any:
        """Run one command as a user would, showing it; returns what it says with --json."""
        line = [str(word) for word in words]
        self.console.print(f"$ steppe {subprocess.list2cmdline(line)}", style="cyan", markup=False, soft_wrap=True)
        wants_json = "--json" in line
        done = subprocess.run(
            [sys.executable, "-P", "-m", "launch.cli", *line],
            stdout=subprocess.PIPE if wants_json else None,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"`steppe {line[0]}` ended with exit code {done.returncode}")
        return json.loads(done.stdout) if wants_json else None


def run_demo(folder: Path, steps: int, nproc: int) -> None:
    """Make the folder, run the demo, print what it did and what comes next.

    Raises ValueError if the folder holds anything but an earlier demo, which is replaced.
    """
    if steps < 20:
        raise ValueError(f"--steps {steps}: the demo needs 20 steps or more, half of them before it stops and resumes")
    folder = folder.resolve()
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ValueError(f"{folder} holds something that is not an earlier demo: choose another --dir")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    demo = Demo(folder, steps, nproc)
    rows = demo.run()

    table = Table(title="What the demo did", title_justify="left")
    table.add_column("stage")
    table.add_column("result", overflow="fold")
    table.add_column("seconds", justify="right")
    for name, said, seconds in rows:
        table.add_row(name, said, f"{seconds:.0f}")
    table.add_section()
    table.add_row("all", str(folder), f"{sum(seconds for *_, seconds in rows):.0f}")
    out = Console()
    out.print(table)
    folder_of_commands = Path(sys.executable).parent
    steppe = "steppe" if shutil.which("steppe") else folder_of_commands / "steppe"
    for purpose, command in (
        ("Look at the curves", f"{folder_of_commands / 'tensorboard'} --logdir {demo.run_dir / 'tensorboard'}"),
        ("Try the model", f"{steppe} generate {demo.run_dir} --prompt 'import os' --temperature 0.8"),
        ("Score any text", f"{steppe} eval {demo.run_dir} --data FILE_OR_FOLDER"),
        ("Train longer", f"{steppe} resume {demo.run_dir} --set schedule.total_steps={2 * steps}"),
        ("A run of your own", 'the five commands under "Your own run" in the README'),
    ):
        out.print(f"{purpose + ':':20}{command}", soft_wrap=True, markup=False, highlight=False)
