"""How a token stream is cut into samples, each at most T tokens: what a row of a batch holds.

A sample is made of *extents*, runs of consecutive tokens. The stream is cut by shuffle blocks of consecutive tokens,
which do not depend on T: the last sample of a block may be short, so that for every T nothing is lost or repeated.
A sample's *number* is its place in file order over the whole stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Extents:
    """Extents of n samples, as a sparse row format has them: those of sample i are `first[i]:first[i + 1]`."""

    first: np.ndarray
    """`(n + 1,)` int64, ascending."""
    start: np.ndarray
    """`(m,)` int64: the extent's first token in the stream."""
    count: np.ndarray
    """`(m,)` int64, positive: its tokens."""

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of each sample: int64 `(n,)`."""
        return np.diff(np.concatenate([[0], np.cumsum(self.count)])[self.first])

    def take(self, numbers: np.ndarray) -> "Extents":
        """The extents of these samples `(k,)`, in this order."""
        sizes = self.first[numbers + 1] - self.first[numbers]
        first = np.concatenate([[0], np.cumsum(sizes)])
        chosen = np.repeat(self.first[numbers] - first[:-1], sizes) + np.arange(first[-1])
        return Extents(first, self.start[chosen], self.count[chosen])


def placed(parts: Sequence[tuple[np.ndarray, Extents]]) -> Extents:
    """All samples of some parts. With each part comes the place of each of its samples among them all: `(k,)`."""
    none = np.zeros(0, dtype=np.int64)
    places, sizes, starts, counts = (
        np.concatenate([none, *arrays])
        for arrays in (
            [places for places, _ in parts],
            [np.diff(extents.first) for _, extents in parts],
            [extents.start for _, extents in parts],
            [extents.count for _, extents in parts],
        )
    )
    return Extents(np.concatenate([[0], np.cumsum(sizes)]), starts, counts).take(np.argsort(places))


class Samples(Protocol):
    """One source cut for one sequence length. Every token that feeds the model is in exactly one sample."""

    sequence_length: int
    """T."""
    block_samples: np.ndarray
    """Samples of each shuffle block, in file order: int64 `(B,)`."""
    block_tokens: np.ndarray
    """Tokens of the samples of each block: int64 `(B,)`, the same for every T."""

    def extents(self, numbers: np.ndarray) -> Extents:
        """Extents of the samples of these numbers, int64 `(n,)`, each in `[0, sum(block_samples))`."""
        ...


class Windows:
    """`Samples` of documents in a row: windows at stride T within each block, whatever document they meet."""

    def __init__(self, tokens: int, block_tokens: int, sequence_length: int) -> None:
        """Cut a stream of `tokens` into blocks of `block_tokens`, and those into windows.

        The stream's last token is no sample's: nothing follows it, so it is a target only.

        Raises:
            ValueError: a block is shorter than a window.
        """
        if block_tokens < sequence_length:
            raise ValueError(
                f"a shuffle block of {block_tokens} tokens is shorter than the sequence length {sequence_length}: "
                "raise data.shuffle_block_bytes"
            )
        self.sequence_length = sequence_length
        self._inputs = max(0, tokens - 1)
        self._block = block_tokens
        blocks = -(-self._inputs // block_tokens)
        self.block_tokens = np.full(blocks, block_tokens, dtype=np.int64)
        self.block_tokens[-1:] = self._inputs - max(0, blocks - 1) * block_tokens
        self.block_samples = -(-self.block_tokens // sequence_length)

    def extents(self, numbers: np.ndarray) -> Extents:
        """One extent a sample, shorter than T only at the end of a block."""
        T = self.sequence_length
        block, window = np.divmod(numbers, -(-self._block // T))
        start = block * self._block + window * T
        end = np.minimum(np.minimum(start + T, (block + 1) * self._block), self._inputs)
        return Extents(np.arange(len(numbers) + 1), start, end - start)


class Listed:
    """`Samples` one by one, in one block: what a change of the sequence length leaves over."""

    def __init__(self, extents: Extents, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self.block_samples = np.array([len(extents)])
        self.block_tokens = np.array([extents.count.sum()])
        self._extents = extents

    def extents(self, numbers: np.ndarray) -> Extents:
        """See `Samples`."""
        return self._extents.take(numbers)


def regroup(extents: Extents, sequence_length: int, whole: bool) -> Extents:
    """The same tokens in the same order, as samples of another sequence length.

    Args:
        extents: of the old samples.
        sequence_length: T of the new ones.
        whole: whether an extent that fits T stays in one piece. Samples are then filled until the next extent does not
            fit (next-fit); else all but the last sample have T tokens.
    """
    if whole:
        return _next_fit(*cut_long(extents.start, extents.count, sequence_length), sequence_length)
    start, count = _join_neighbours(extents.start, extents.count)
    place = np.concatenate([[0], np.cumsum(count)])
    sample_places = np.arange(0, place[-1], sequence_length)
    edges = np.union1d(place, sample_places)
    piece = np.searchsorted(place, edges[:-1], side="right") - 1
    return Extents(
        np.append(np.searchsorted(edges, sample_places), len(piece)),
        start[piece] + edges[:-1] - place[piece],
        np.diff(edges),
    )


def _join_neighbours(start: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Extents of which each goes on where the one before ends become one: a document is not cut for nothing."""
    begins = np.flatnonzero(np.concatenate([np.ones(len(start[:1]), bool), start[1:] != start[:-1] + count[:-1]]))
    return start[begins], np.add.reduceat(count, begins) if len(begins) else count


def cut_long(start: np.ndarray, count: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Extents of more than T tokens become pieces of T and a rest."""
    pieces = -(-count // T)
    end = np.repeat(start + count, pieces)
    within = np.arange(len(end)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = np.repeat(start, pieces) + within * T
    return start, np.minimum(T, end - start)


def _next_fit(start: np.ndarray, count: np.ndarray, T: int) -> Extents:
    place = np.concatenate([[0], np.cumsum(count)])
    # Where the sample that begins with an extent ends, for every extent; then from sample to sample.
    after = (np.searchsorted(place, place[:-1] + T, side="right") - 1).tolist()
    first = [0]
    while first[-1] < len(after):
        first.append(after[first[-1]])
    return Extents(np.array(first), start, count)
