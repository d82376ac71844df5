"""The start of a run in `steppe bench data`: from nothing to the first batch, on a manifest of very many tokens."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.bench.data_tables import below, in_words, print_part, say
from launch.bench.turns import Contender, Spread, take_turns

SECONDS_TARGET = 1.0
SMALL = 1_000
"""The manifest that memory is compared with describes so many times fewer tokens."""
MEMORY_TARGET_MB = 100
"""At the peak, in all: it may follow the number of shards, not that of tokens or samples."""


@dataclass(frozen=True)
class Start:
    """A place to start at, in a process of its own each time."""

    name: str
    what: str
    folder: Path
    first_position: int

    def ask(self, **question: Any) -> dict[str, Any]:
        """One turn."""
        began = time.perf_counter()
        with Contender(self.name, "launch.bench.data_start_contender", [str(self.folder)], 1) as process:
            process.built()
            built_seconds = time.perf_counter() - began
            return process.ask(first_position=self.first_position, **question) | {"process_seconds": built_seconds}


def run(tokens: int, sequence_length: int, micro_batch_size: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Measure; returns what `--json` prints.

    Args:
        tokens: that the manifest describes.
        sequence_length: T.
        micro_batch_size: rows of the first batch.
        rounds: turns of each start.
        scratch: a folder to work in, on a file system with sparse files.
    """
    from launch.bench.data_vast import write_vast

    say(f"describing {tokens:.3g} tokens")
    large = write_vast(scratch / "large", tokens)
    small = write_vast(scratch / "small", tokens // SMALL)
    # In the middle of the second epoch.
    later = int(1.5 * large.tokens / sequence_length)
    starts = [
        Start("large", "the first step of a run", scratch / "large", 0),
        Start("large, resumed", f"the same manifest from position {later:,} on", scratch / "large", later),
        Start("small", "the first step on a manifest of a thousandth of the tokens", scratch / "small", 0),
    ]
    shape = {"sequence_length": sequence_length, "micro_batch_size": micro_batch_size}
    traced = take_turns(starts, 1, {**shape, "traced": True}, lambda name, number: say(f"memory: {name}"))
    answers = take_turns(
        starts, rounds, {**shape, "traced": False}, lambda name, number: say(f"round {number + 1}/{rounds}: {name}")
    )
    seconds = {name: Spread.of([turn["seconds"] for turn in turns]) for name, turns in answers.items()}
    return {
        "tokens": {"large": large.tokens, "small": small.tokens},
        "shards": {"large": len(large.shards), "small": len(small.shards)},
        "manifest_bytes": {size: (scratch / size / "manifest.json").stat().st_size for size in ("large", "small")},
        **shape,
        "rounds": rounds,
        "contenders": {
            start.name: {
                "what": start.what,
                "seconds": seconds[start.name].as_dict(),
                **{
                    f"{part}_seconds": Spread.of([turn[f"{part}_seconds"] for turn in answers[start.name]]).as_dict()
                    for part in ("manifest", "loader", "process")
                },
                "manifest_held_bytes": traced[start.name][0]["manifest_held_bytes"],
                "loader_peak_bytes": traced[start.name][0]["loader_peak_bytes"],
                "peak_bytes": traced[start.name][0]["peak_bytes"],
            }
            for start in starts
        },
        "targets": [
            verdict
            for start in starts[:2]
            for verdict in (
                below(f"seconds to the first batch, {start.name}", SECONDS_TARGET, seconds[start.name]),
                below(
                    f"MB at the peak, {start.name}",
                    MEMORY_TARGET_MB,
                    Spread.of([traced[start.name][0]["peak_bytes"] / 1e6]),
                ),
            )
        ],
    }


def print_table(result: dict[str, Any]) -> None:
    """What `run` returned."""
    rows = [
        [
            name,
            in_words(start["seconds"], 3),
            f"{start['manifest_seconds']['median']:.3f}",
            f"{start['loader_seconds']['median']:.3f}",
            f"{start['process_seconds']['median']:.2f}",
            f"{start['peak_bytes'] / 1e6:.1f}",
            f"{start['manifest_held_bytes'] / 1e6:.1f}",
            f"{start['loader_peak_bytes'] / 1e6:.1f}",
        ]
        for name, start in result["contenders"].items()
    ]
    print_part(
        f"Start: {result['tokens']['large']:.4g} tokens in {result['shards']['large']:,} shards (manifest of "
        f"{result['manifest_bytes']['large'] / 1e6:.1f} MB), and {result['tokens']['small']:.4g} in "
        f"{result['shards']['small']:,}",
        ("start", "first batch, s", "manifest", "loader", "process", "peak MB", "of manifest", "beyond it"),
        rows,
        {name: start["what"] for name, start in result["contenders"].items()},
        f"{result['rounds']} rounds, each in a fresh process whose start and imports are told apart (process); "
        f"medians (min-max). First batch: {result['micro_batch_size']} x {result['sequence_length']} tokens, read, "
        "verified and made, beside what the loader's thread does ahead of it. Memory is what Python and numpy "
        "allocated at most, in a process of its own: in all, of the manifest once it is loaded, and on top of that. "
        "Shards are sparse files.",
        result,
    )
