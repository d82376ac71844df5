"""Data folders as a stranger reads them, and corpora of many small files to prepare."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.manifest import Manifest
from data_pipeline.shards import read_index

WORDS = Path(json.__file__).read_text(encoding="utf-8").split()


def documents_of(folder: Path) -> list[list[int]]:
    """By the index, then the tokens it points to."""
    manifest = Manifest.load(folder)
    documents = []
    for shard in manifest.shards:
        lengths, offsets = read_index(folder / f"{shard.name}.idx")
        content = (folder / f"{shard.name}.bin").read_bytes()
        for length, offset in zip(lengths.tolist(), offsets.tolist(), strict=True):
            documents.append(np.frombuffer(content, manifest.numpy_dtype, length, offset).tolist())
    return documents


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sample_texts(count: int, seed: int = 0, words: int = 200) -> list[str]:
    """Random words of a program; no two of these texts are alike."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(20, words))) for _ in range(count)]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A JSON lines file."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_corpus(folder: Path, texts: list[str], files: int) -> Path:
    """The texts in so many JSON lines files, in order."""
    folder.mkdir()
    each = -(-len(texts) // files)
    for number in range(files):
        part = texts[number * each : (number + 1) * each]
        write_rows(folder / f"part_{number:03d}.jsonl", [{"text": text} for text in part])
    return folder
