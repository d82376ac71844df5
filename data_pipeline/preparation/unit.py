"""What a unit of a preparation has become so far: shards under names of its own, and its counts."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from data_pipeline.origins import ORIGIN_DTYPE
from data_pipeline.preparation.counts import Counts
from data_pipeline.preparation.plan import Plan
from data_pipeline.shards import ShardInfo, read_index


@dataclass(frozen=True)
class UnitResult:
    """The result of a task on a unit."""

    folder: str
    """The name of the folder in which its shards are."""
    shards: tuple[ShardInfo, ...]
    counts: Counts

    def to_json(self) -> dict[str, Any]:
        shards = [asdict(shard) for shard in self.shards]
        return {"folder": self.folder, "shards": shards, "counts": self.counts.to_json()}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        shards = tuple(ShardInfo(**shard) for shard in tree["shards"])
        return cls(tree["folder"], shards, Counts.from_json(tree["counts"]))


def shard_arrays(folder: Path, shards: tuple[ShardInfo, ...]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each shard: its documents' tokens `(n,)`, and their origins `(n,)`."""
    for shard in shards:
        lengths, _ = read_index(folder / f"{shard.name}.idx")
        yield lengths, np.fromfile(folder / f"{shard.name}.origin", dtype=ORIGIN_DTYPE)


def count_kept(counts: Counts, plan: Plan, folder: Path, shards: tuple[ShardInfo, ...]) -> None:
    """Add to the counts what stands in the shards, which stay as they are."""
    input_of_file = np.array([planned.input for planned in plan.files])
    for lengths, origins in shard_arrays(folder, shards):
        inputs = input_of_file[origins["file"]]
        for number in np.unique(inputs).tolist():
            chosen = inputs == number
            counts.inputs[plan.corpus.inputs[number].name].keep(lengths[chosen], origins["text_bytes"][chosen])
