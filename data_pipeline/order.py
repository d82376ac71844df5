"""The order of the samples, as a pure function of the position: (seed, stages, position) -> (source, epoch, sample).

Nothing but the position is ever stored. The number of ranks, the micro-batch and a resume do not enter.

Two levels. The *mixture* says which source serves a position, and how many of its samples were served before: its
*ordinal*. The *source order* says which window the ordinal is: shuffle blocks are permuted, then the windows within
each group of K permuted blocks, so that whoever reads on works in K places of the disk at a time.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from data_pipeline.permutation import derive_key, mix, permute, unpermute

MIXTURE_BLOCK = 4096
"""M: within each M positions of a stage every source has exactly its share."""


@dataclass(frozen=True)
class Stage:
    """From position `start` on, sources are mixed by these weights. A source that is not named has none."""

    start: int
    weights: dict[str, float]


class SampleOrder:
    """See the module. Equal arguments give equal orders, on any machine; sources are known by name, never by place."""

    def __init__(
        self, windows: Mapping[str, int], block_windows: int, group_blocks: int, seed: int, stages: Sequence[Stage]
    ) -> None:
        """Describe the order.

        Args:
            windows: windows of each source, by name.
            block_windows: W, windows of a shuffle block; a source's last block may be shorter.
            group_blocks: K, blocks whose windows are shuffled among each other.
            seed: of the run.
            stages: by ascending start, the first at position 0. A stage may start anywhere: sources go on from where
                they were.

        Raises:
            ValueError: the stages are out of order, name an unknown or empty source, or have an unusable weight.
        """
        assert block_windows > 0
        assert group_blocks > 0
        self.sources = tuple(sorted(windows))
        """What the numbers in `samples` stand for."""
        self._orders = [_SourceOrder(name, windows[name], block_windows, group_blocks, seed) for name in self.sources]
        starts = [stage.start for stage in stages]
        if not starts or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
            raise ValueError(f"stages start at {starts}, but the first must start at 0 and each later than the last")
        for name in stages[-1].weights:
            if not windows.get(name):
                state = "has no full window of data" if name in windows else "is not among data.sources"
                raise ValueError(f"the mixture names source {name!r}, which {state}: remove it or give it data")
        self._starts = np.array(starts)
        self._mixtures: list[_Mixture] = []
        consumed: dict[str, int] = {}
        for number, stage in enumerate(stages):
            mixture = _Mixture(stage, consumed, seed)
            self._mixtures.append(mixture)
            if number + 1 < len(stages):
                consumed = mixture.consumed_before(stages[number + 1].start)

    def samples(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Who serves each position: source (place in `sources`), epoch and window, int64 arrays `(n,)` each.

        Cheapest for many positions a call.

        Raises:
            ValueError: a position belongs to an earlier stage that used a source which is no longer given.
        """
        positions = np.asarray(positions, dtype=np.int64)
        source = np.empty(len(positions), dtype=np.int64)
        epoch = np.empty(len(positions), dtype=np.int64)
        sample = np.empty(len(positions), dtype=np.int64)
        stage_of = np.searchsorted(self._starts, positions, side="right") - 1
        for stage in np.unique(stage_of):
            in_stage = np.flatnonzero(stage_of == stage)
            mixture = self._mixtures[stage]
            place, ordinal = mixture.ordinals(positions[in_stage])
            for number in np.unique(place):
                name = mixture.names[number]
                if name not in self.sources:
                    raise ValueError(f"source {name!r} served these positions, but is not among data.sources now")
                known = self.sources.index(name)
                chosen = place == number
                at = in_stage[chosen]
                source[at] = known
                epoch[at], sample[at] = self._orders[known].windows(ordinal[chosen])
        return source, epoch, sample

    def consumed_before(self, position: int) -> dict[str, int]:
        """Samples that each source has served at the positions below this one."""
        stage = int(np.searchsorted(self._starts, max(position - 1, 0), side="right")) - 1
        return self._mixtures[stage].consumed_before(position)


class _Mixture:
    """One stage: which source serves a position, and how many samples of that source came before."""

    def __init__(self, stage: Stage, consumed: dict[str, int], seed: int) -> None:
        self.names = sorted(set(stage.weights) | set(consumed))
        self._start = stage.start
        self._counts = np.array(shares(stage.weights, self.names), dtype=np.int64)
        self._base = np.array([consumed.get(name, 0) for name in self.names], dtype=np.int64)
        self._key = derive_key("mixture", seed, stage.start)
        self._block = lru_cache(maxsize=8)(self._make_block)

    def ordinals(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source (place in `names`) and ordinal within that source, of each position."""
        block, offset = np.divmod(positions - self._start, MIXTURE_BLOCK)
        place = np.empty(len(positions), dtype=np.int64)
        earlier = np.empty(len(positions), dtype=np.int64)
        for number in np.unique(block):
            chosen = block == number
            block_place, block_earlier = self._block(int(number))
            place[chosen] = block_place[offset[chosen]]
            earlier[chosen] = block_earlier[offset[chosen]]
        return place, self._base[place] + block * self._counts[place] + earlier

    def consumed_before(self, position: int) -> dict[str, int]:
        """Samples that each source has served before this position of this stage, in all stages."""
        block, offset = divmod(position - self._start, MIXTURE_BLOCK)
        in_block = np.bincount(self._block(block)[0][:offset], minlength=len(self.names))
        total = self._base + block * self._counts + in_block
        return {name: int(count) for name, count in zip(self.names, total, strict=True)}

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each position of a mixture block: its source, and how often that source came earlier in the block.

        Counting what came earlier, rather than taking the permuted slot for the ordinal, is what lets a stage end in
        the middle of a block: what the block has served by then is always the source's first ordinals.
        """
        slots = permute(np.arange(MIXTURE_BLOCK), MIXTURE_BLOCK, derive_key(self._key, block))
        place = np.searchsorted(np.cumsum(self._counts), slots, side="right")
        by_source = np.argsort(place, kind="stable")
        earlier = np.empty(MIXTURE_BLOCK, dtype=np.int64)
        earlier[by_source] = np.arange(MIXTURE_BLOCK) - np.repeat(np.cumsum(self._counts) - self._counts, self._counts)
        return place, earlier


def shares(weights: Mapping[str, float], names: Sequence[str]) -> list[int]:
    """Positions of each source in a mixture block: M split by weight, with the largest remainders rounded up.

    Exact in rationals, and ties go by name, so that it is the same everywhere.

    Raises:
        ValueError: a weight is not positive, or so small that its source would never be served.
    """
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise ValueError(
                f"the weight of source {name!r} is {weight}, but weights must be positive: remove the source"
            )
    if not weights:
        raise ValueError("a stage of the mixture has no source: give at least one a weight")
    exact = {name: Fraction(weight) for name, weight in weights.items()}
    total = sum(exact.values())
    exact = {name: weight / total * MIXTURE_BLOCK for name, weight in exact.items()}
    counts = {name: int(share) for name, share in exact.items()}
    missing = MIXTURE_BLOCK - sum(counts.values())
    for name in sorted(exact, key=lambda name: (counts[name] - exact[name], name))[:missing]:
        counts[name] += 1
    for name, count in counts.items():
        if not count:
            raise ValueError(
                f"source {name!r} has {float(exact[name]) / MIXTURE_BLOCK:.2g} of the mixture's weight, but the "
                f"smallest share is 1/{MIXTURE_BLOCK}: raise its weight or remove it"
            )
    return [counts.get(name, 0) for name in names]


class _SourceOrder:
    """The windows of one source, shuffled anew each epoch: ordinal -> (epoch, window).

    An epoch has B = ceil(n / W) blocks, of which the last is *short* by n's deficit to B * W. At slot s of the epoch
    stands block `permute(s)`; K slots are a group.
    """

    def __init__(self, name: str, windows: int, block_windows: int, group_blocks: int, seed: int) -> None:
        self._name = name
        self._seed = seed
        self._n = windows
        self._W = block_windows
        self._K = group_blocks
        self._B = -(-windows // block_windows)
        self._deficit = self._B * block_windows - windows
        self._epoch = lru_cache(maxsize=8)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> tuple[int, int, int]:
        """Key of the blocks, key of the groups, and the slot of the short block."""
        block_key = derive_key("blocks", self._seed, self._name, epoch)
        group_key = derive_key("windows", self._seed, self._name, epoch)
        return block_key, group_key, int(unpermute(np.array([self._B - 1]), self._B, block_key)[0])

    def windows(self, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and window of each ordinal."""
        epoch, ordinal = np.divmod(ordinals, self._n)
        window = np.empty_like(ordinal)
        for number in np.unique(epoch):
            chosen = epoch == number
            window[chosen] = self._windows_of_epoch(ordinal[chosen], int(number))
        return epoch, window

    def _windows_of_epoch(self, ordinal: np.ndarray, epoch: int) -> np.ndarray:
        W, K, deficit = self._W, self._K, self._deficit
        block_key, group_key, short_slot = self._epoch(epoch)
        short_group = short_slot // K
        # Groups after the one with the short block start earlier by its deficit.
        after_short = ordinal >= (short_group + 1) * K * W - deficit
        group = (ordinal + deficit * after_short) // (K * W)
        group_start = group * K * W - deficit * after_short
        group_blocks = np.minimum(K, self._B - group * K)
        has_short = group == short_group
        group_size = group_blocks * W - deficit * has_short
        keys = mix(np.uint64(group_key) ^ group.astype(np.uint64))
        place = permute(ordinal - group_start, group_size, keys)
        # Back from a place among the group's windows to slot and window: past the short block, the deficit is added.
        short_end = (short_slot - group * K + 1) * W - deficit
        place += deficit * (has_short & (place >= short_end))
        slot_in_group, window_in_block = np.divmod(place, W)
        slot, inverse = np.unique(group * K + slot_in_group, return_inverse=True)
        block = permute(slot, self._B, block_key)
        return block[inverse] * W + window_in_block
