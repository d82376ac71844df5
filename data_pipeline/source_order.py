"""The samples of one source, shuffled anew each epoch: ordinal -> (epoch, cut, number).

Each epoch permutes the shuffle blocks; K permuted blocks are a *group*, and the samples of a group are shuffled among
each other, so that whoever reads on works in K places of the disk at a time.

The sequence length may change at any ordinal. The group that is begun is then drained: its samples that are left,
in their shuffled order, are regrouped to the new length. The epoch goes on with the next group, cut for that length.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from data_pipeline.permutation import derive_key, mix, permute
from data_pipeline.samples import Extents, Listed, Samples, regroup

PERMUTED_AT_ONCE = 1 << 14
"""Blocks: what the permutation works with then fits a core's cache."""


class OrderedSource(Protocol):
    """What the order must know of a source."""

    whole: bool
    """Whether its samples are made of whole documents, so that a change of length cuts none that fits."""

    def cut(self, sequence_length: int) -> Samples:
        """The source cut for this length; cheap to ask again.

        Raises:
            ValueError: it cannot be.
        """
        ...


@dataclass(frozen=True)
class _Span:
    """What is served from an ordinal on with one sequence length: what a change left over, then whole groups."""

    first: int
    """Ordinal."""
    samples: Samples
    block_first: np.ndarray
    """Number of each block's first sample: int64 `(B,)`."""
    leftover: int
    """Samples that the drained group of `epoch` was regrouped to."""
    epoch: int
    next_group: int
    """Where `epoch` goes on after the leftover."""
    next_place: int
    """Samples of all the groups of `epoch` before that one, had they been cut for this length."""


class SourceOrder:
    """See the module. A sample's *place* is its turn within the epoch; its *cut* says how the source was cut then."""

    def __init__(self, name: str, source: OrderedSource, group_blocks: int, seed: int) -> None:
        """Describe the order. Nothing can be asked of it before the first `recut`.

        Args:
            name: of the source; its shuffle depends on it.
            source: what is shuffled.
            group_blocks: K.
            seed: of the run.
        """
        assert group_blocks > 0
        self._name = name
        self._source = source
        self._K = group_blocks
        self._seed = seed
        self._spans: list[_Span] = []
        # Few, since a source of 10 trillion tokens has 3e5 blocks, and a group's samples are some megabytes.
        self._blocks = lru_cache(maxsize=2)(self._make_blocks)
        self._slot_starts = lru_cache(maxsize=2)(self._make_slot_starts)
        self._leftover = lru_cache(maxsize=2)(self._make_leftover)

    def recut(self, ordinal: int, sequence_length: int) -> None:
        """From this ordinal on, samples have this length. Ordinals ascend from call to call; the first is 0.

        All recuts come before the first question.

        Raises:
            ValueError: the source has no data, or cannot be cut so.
        """
        if self._spans and self._spans[-1].first == ordinal:
            self._spans.pop()  # nothing was served in that way
        if self._spans and self._spans[-1].samples.sequence_length == sequence_length:
            return
        samples = self._source.cut(sequence_length)
        if not samples.block_samples.any():
            raise ValueError(f"the mixture names source {self._name!r}, which has no data: remove it or give it data")
        epoch, next_group, next_place, leftover = 0, 0, 0, 0
        if self._spans:
            old = self._spans[-1]
            assert ordinal > old.first
            if not np.array_equal(samples.block_tokens, old.samples.block_tokens):
                raise ValueError(
                    f"source {self._name!r} was packed for {old.samples.sequence_length} and for {sequence_length} "
                    "tokens with different shuffle blocks: pack it for both with the same ones"
                )
            epoch, next_group, left = self._begun(len(self._spans) - 1, ordinal)
            leftover = len(regroup(left, sequence_length, self._source.whole))
            next_place = int(samples.block_samples[self._blocks(epoch)[: next_group * self._K]].sum())
        else:
            assert ordinal == 0
        block_first = np.cumsum(samples.block_samples) - samples.block_samples
        self._spans.append(_Span(ordinal, samples, block_first, leftover, epoch, next_group, next_place))

    def pick(self, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, cut and number of each ordinal: int64 `(n,)` each."""
        epoch, cut, number = (np.empty(len(ordinals), dtype=np.int64) for _ in range(3))
        span_of = self._span_of(ordinals)
        for index in np.unique(span_of).tolist():
            span = self._spans[index]
            in_span = np.flatnonzero(span_of == index)
            offset = ordinals[in_span] - span.first
            drains = offset < span.leftover
            left, regular = in_span[drains], in_span[~drains]
            epoch[left], cut[left], number[left] = span.epoch, 2 * index + 1, offset[drains]
            cut[regular] = 2 * index
            epoch[regular], place = _epoch_place(span, offset[~drains])
            for of_epoch in np.unique(epoch[regular]).tolist():
                chosen = epoch[regular] == of_epoch
                number[regular[chosen]] = self._numbers(index, of_epoch, place[chosen])
        return epoch, cut, number

    def extents(self, cut: int, numbers: np.ndarray) -> Extents:
        """Extents of samples `(n,)` that `pick` gave with this cut.

        Raises:
            ValueError: the files that say so are damaged.
        """
        span, is_leftover = divmod(cut, 2)
        samples = self._leftover(span) if is_leftover else self._spans[span].samples
        return samples.extents(numbers)

    def end_of(self, epochs: int) -> int:
        """The ordinal with which so many epochs are over, if the length stays as it was last set.

        An ordinal below the last change stands for any that has passed by then.
        """
        span = self._spans[-1]
        if epochs <= span.epoch:
            return span.first
        size = int(span.samples.block_samples.sum())
        return span.first + span.leftover + (epochs - span.epoch) * size - span.next_place

    def consumed_before(self, ordinal: int) -> tuple[int, float]:
        """Tokens that fed the model below this ordinal, and the same in epochs of the source."""
        if not ordinal:
            return 0, 0.0
        index = int(self._span_of(np.array([ordinal]))[0])
        epoch, next_group, left = self._begun(index, ordinal)
        block_tokens = self._spans[index].samples.block_tokens
        started = int(block_tokens[self._blocks(epoch)[: next_group * self._K]].sum())
        in_epoch, all_tokens = started - int(left.count.sum()), int(block_tokens.sum())
        return epoch * all_tokens + in_epoch, epoch + in_epoch / all_tokens

    def _span_of(self, ordinals: np.ndarray) -> np.ndarray:
        return np.searchsorted([span.first for span in self._spans], ordinals, side="right") - 1

    def _begun(self, index: int, ordinal: int) -> tuple[int, int, Extents]:
        """Before this ordinal of a span: the epoch, the first group not begun, and what is left of the one begun."""
        span = self._spans[index]
        offset = ordinal - span.first
        if offset < span.leftover:
            left = self._leftover(index).extents(np.arange(offset, span.leftover))
            return span.epoch, span.next_group, left
        epoch, place = map(int, _epoch_place(span, np.int64(offset)))
        starts = self._slot_starts(index, epoch)
        next_group = int(np.searchsorted(starts[:: self._K], place))
        end = int(starts[min(next_group * self._K, len(starts) - 1)])
        return epoch, next_group, span.samples.extents(self._numbers(index, epoch, np.arange(place, end)))

    def _numbers(self, index: int, epoch: int, place: np.ndarray) -> np.ndarray:
        """Numbers of the samples at these places of an epoch `(n,)`."""
        starts, blocks = self._slot_starts(index, epoch), self._blocks(epoch)
        group = np.searchsorted(starts[: -1 : self._K], place, side="right") - 1
        begin = starts[group * self._K]
        size = starts[np.minimum((group + 1) * self._K, len(blocks))] - begin
        keys = mix(np.uint64(derive_key("windows", self._seed, self._name, epoch)) ^ group.astype(np.uint64))
        shuffled = begin + permute(place - begin, size, keys)
        slot = np.searchsorted(starts, shuffled, side="right") - 1
        return self._spans[index].block_first[blocks[slot]] + shuffled - starts[slot]

    def _make_blocks(self, epoch: int) -> np.ndarray:
        """The block at each slot of an epoch: int64 `(B,)`."""
        blocks = len(self._spans[0].block_first)
        key = derive_key("blocks", self._seed, self._name, epoch)
        parts = np.split(np.arange(blocks), np.arange(PERMUTED_AT_ONCE, blocks, PERMUTED_AT_ONCE))
        return np.concatenate([permute(part, blocks, key) for part in parts])

    def _make_slot_starts(self, index: int, epoch: int) -> np.ndarray:
        """The place at which each slot begins, and the end of the epoch: int64 `(B + 1,)`."""
        return np.concatenate([[0], np.cumsum(self._spans[index].samples.block_samples[self._blocks(epoch)])])

    def _make_leftover(self, index: int) -> Listed:
        """What a span begins with; made anew rather than kept, as a run may have many changes and sources."""
        span = self._spans[index]
        left = self._begun(index - 1, span.first)[2]
        return Listed(regroup(left, span.samples.sequence_length, self._source.whole), span.samples.sequence_length)


def _epoch_place(span: _Span, offset: np.ndarray | np.integer) -> tuple[np.ndarray, np.ndarray]:
    """Epoch, and place in it, of what a span serves so many samples after its first, past the leftover."""
    epoch, place = np.divmod(offset - span.leftover + span.next_place, span.samples.block_samples.sum())
    return span.epoch + epoch, place
