"""Sources and orders for the tests of the order, without files; and what samples hold, token by token."""

from dataclasses import dataclass

import numpy as np

from data_pipeline.order import SampleOrder, Stage
from data_pipeline.samples import Extents, Samples, Windows, regroup


@dataclass(frozen=True)
class WindowSource:
    """Documents in a row."""

    tokens: int
    block_tokens: int
    whole: bool = False

    def cut(self, sequence_length: int) -> Samples:
        return Windows(self.tokens, self.block_tokens, sequence_length)


class WholeDocuments:
    """Whole documents, packed next-fit within each block of some documents; a block may be empty."""

    def __init__(self, blocks: list[list[Extents]], sequence_length: int) -> None:
        packed = [regroup(_joined(block), sequence_length, whole=True) for block in blocks]
        self.sequence_length = sequence_length
        self.block_samples = np.array([len(extents) for extents in packed])
        self.block_tokens = np.array([extents.count.sum() for extents in packed])
        self._all = _joined(packed)

    def extents(self, numbers: np.ndarray) -> Extents:
        return self._all.take(numbers)


@dataclass(frozen=True)
class DocumentSource:
    """Documents of given lengths, so many of them in each block."""

    blocks: tuple[tuple[int, ...], ...]
    whole: bool = True

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.blocks))

    def cut(self, sequence_length: int) -> Samples:
        start, blocks = 0, []
        for lengths in self.blocks:
            ends = start + np.cumsum(lengths, dtype=np.int64)
            counts = np.array(lengths, dtype=np.int64)
            blocks.append([Extents(np.arange(len(lengths) + 1), ends - counts, counts)])
            start += sum(lengths)
        return WholeDocuments(blocks, sequence_length)


def _joined(parts: list[Extents]) -> Extents:
    sizes = np.concatenate([[0], *(np.diff(part.first) for part in parts)])
    start, count = (np.concatenate([np.zeros(0, int), *(getattr(p, k) for p in parts)]) for k in ("start", "count"))
    return Extents(np.cumsum(sizes), start, count)


def tokens_of(extents: Extents) -> np.ndarray:
    """Every token of the samples, in their order: places in the stream."""
    ends = np.repeat(np.cumsum(extents.count), extents.count)
    return np.repeat(extents.start + extents.count, extents.count) - ends + np.arange(len(ends))


T, W = 4, 100
WINDOWS = {"a": 9001, "b": 5000, "c": 301}
SOURCES = {name: WindowSource(count * T + 1, W * T) for name, count in WINDOWS.items()}
WEIGHTS = {"a": 0.7, "b": 0.2, "c": 0.1}
MIXED = [Stage(0, WEIGHTS, T)]


def order(stages: list[Stage] = MIXED, sources: dict[str, WindowSource] = SOURCES, seed: int = 7) -> SampleOrder:
    return SampleOrder(sources, 4, seed, stages)


def arrays(source_order: SampleOrder, positions: np.ndarray) -> np.ndarray:
    """Source, epoch, cut and number of each position: `(4, n)`."""
    picked = source_order.samples(positions)
    return np.stack([picked.source, picked.epoch, picked.cut, picked.number])


def served(source_order: SampleOrder, end: int) -> dict[str, list[tuple[int, int, int]]]:
    """(epoch, cut, number) of each source, in the order served."""
    source, *sample = arrays(source_order, np.arange(end))
    return {
        name: list(zip(*(array[source == place].tolist() for array in sample), strict=True))
        for place, name in enumerate(source_order.sources)
    }
