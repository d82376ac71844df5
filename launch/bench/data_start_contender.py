"""A start of `steppe bench data --part start`: `python -P -m launch.bench.data_start_contender FOLDER`.

It answers, once, how long a data folder's manifest and the first batch from a position on took, or with "traced" how
much memory.
"""

import itertools
import sys
import time
import tracemalloc
from typing import Any

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.loader import Loader
from data_pipeline.manifest import Manifest
from data_pipeline.order import Stage
from launch.bench.turns import Answers


def start(
    folder: str, sequence_length: int, micro_batch_size: int, first_position: int, traced: bool
) -> dict[str, Any]:
    """What a rank does at its start."""
    source = SourceConfig(name="tokens", path=folder)
    data = DataConfig(sequence_length=sequence_length, sources=(source,))
    plan = ((position, micro_batch_size) for position in itertools.count(first_position, micro_batch_size))
    if traced:
        tracemalloc.start()
    began = time.perf_counter()
    manifest = Manifest.load(folder)
    loaded = time.perf_counter()
    held_bytes, manifest_peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    stages = [Stage(0, {"tokens": 1.0}, sequence_length)]
    loader = Loader(data, 0, stages, 0, 1, micro_batch_size, False, plan, {folder: manifest})
    (batch,) = next(loader)
    ended = time.perf_counter()
    assert batch.tokens.shape == (micro_batch_size, sequence_length)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    loader.close()
    return {
        "seconds": ended - began,
        "manifest_seconds": loaded - began,
        "loader_seconds": ended - loaded,
        "manifest_held_bytes": held_bytes,
        "loader_peak_bytes": peak_bytes - held_bytes,
        "peak_bytes": max(manifest_peak_bytes, peak_bytes),
    }


def main() -> None:
    """Answer until stdin ends."""
    answers = Answers()
    answers.say(folder=sys.argv[1])
    for question in answers.questions():
        answers.say(**start(sys.argv[1], **question))


if __name__ == "__main__":
    main()
