"""`steppe bench data`: preparation, loading and the start of a run, in turn with peers on the same work."""

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.bench import data_loader, data_prepare, data_start

PARTS = {"prepare": data_prepare.print_table, "loader": data_loader.print_table, "start": data_start.print_table}


def data(
    parts: Annotated[
        list[str],
        typer.Option("--part", help=f"What to measure, of {', '.join(PARTS)}; may be repeated. All by default."),
    ] = [],  # noqa: B006
    inputs: Annotated[
        list[str],
        typer.Option("--input", help="prepare: file or folder of text; may be repeated. By default Python's sources."),
    ] = [],  # noqa: B006
    text_mb: Annotated[
        int, typer.Option(min=1, help="prepare: the text is repeated until there are about so many MB.")
    ] = 64,
    tokenizer: Annotated[
        Path | None, typer.Option(help="prepare: a sentencepiece model. By default one is trained on the text.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=1, help="prepare: pieces of the one that is trained.")] = 32_000,
    workers: Annotated[
        list[int], typer.Option(min=1, help="prepare: how many; may be repeated. By default 1, 2, 4, ... all cores.")
    ] = [],  # noqa: B006
    tokens: Annotated[int, typer.Option(min=1, help="loader: tokens that are read.")] = 200_000_000,
    seconds: Annotated[float, typer.Option(min=0.01, help="loader: of a turn.")] = 1.0,
    described_tokens: Annotated[
        int, typer.Option(min=1, help="start: tokens that the manifest describes.")
    ] = 10_000_000_000_000,
    sequence_length: Annotated[int, typer.Option(min=1, help="loader, start: tokens of a sample.")] = 2048,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="loader, start: samples of a batch.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 5,
    folder: Annotated[
        Path, typer.Option("--dir", help="Where to write; a temporary folder is made in it, and removed.")
    ] = Path("."),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """MB/s of `steppe data prepare` by workers, in turn with raw sentencepiece and datatrove; tokens/s of the loader,
    in turn with np.memmap, litdata and datasets; and how long a run on trillions of tokens takes to its first batch.

    Peers that are not installed are left out, and named.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"--part {part} is not known: choose from {', '.join(PARTS)}")
    if not folder.is_dir():
        raise ValueError(f"--dir {folder} is no folder: make it first, or name another")
    chosen = [part for part in PARTS if not parts or part in parts]
    result: dict[str, Any] = {"threads": len(os.sched_getaffinity(0)), "rounds": rounds}
    for part in chosen:
        with tempfile.TemporaryDirectory(prefix="steppe-bench-", dir=folder) as made:
            scratch = Path(made).resolve()
            if part == "prepare":
                counts = sorted(set(workers)) or worker_counts(result["threads"])
                result[part] = data_prepare.run(
                    inputs, tokenizer, vocab_size, text_mb * 1_000_000, counts, rounds, scratch
                )
            elif part == "loader":
                result[part] = data_loader.run(tokens, sequence_length, micro_batch_size, seconds, rounds, scratch)
            else:
                result[part] = data_start.run(described_tokens, sequence_length, micro_batch_size, rounds, scratch)
        if not as_json:
            PARTS[part](result[part])
    if as_json:
        print(json.dumps(result))


def worker_counts(cores: int) -> list[int]:
    """1, 2, 4, ... and all cores."""
    return sorted({2**power for power in range(cores.bit_length()) if 2**power < cores} | {cores})
