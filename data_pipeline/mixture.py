"""Which source serves a position of the run, and how many of its samples came before: its *ordinal*."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from data_pipeline.permutation import derive_key, permute

MIXTURE_BLOCK = 4096
"""M: within each M positions of a stage every source has exactly its share."""


class Mixture:
    """One stage, from position `start` on. Without weights it serves nothing, and no position may be asked of it."""

    def __init__(self, start: int, weights: Mapping[str, float], consumed: Mapping[str, int], seed: int) -> None:
        """Mix sources by their weights.

        Args:
            start: the stage's first position.
            weights: of each source by name.
            consumed: samples that sources have served before `start`.
            seed: of the run.

        Raises:
            ValueError: a weight is unusable.
        """
        self.names = sorted(set(weights) | set(consumed))
        """What the places in `ordinals` stand for."""
        self._start = start
        counts = shares(weights, self.names) if weights else [0] * len(self.names)
        self._counts = np.array(counts, dtype=np.int64)
        self._base = np.array([consumed.get(name, 0) for name in self.names], dtype=np.int64)
        self._key = derive_key("mixture", seed, start)
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
        total = self._base
        if self._counts.any():
            block, offset = divmod(position - self._start, MIXTURE_BLOCK)
            in_block = np.bincount(self._block(block)[0][:offset], minlength=len(self.names))
            total = self._base + block * self._counts + in_block
        return {name: int(count) for name, count in zip(self.names, total, strict=True)}

    def position_after(self, name: str, ordinal: int) -> int:
        """The position right after the one where a source with a weight serves this ordinal, if no stage comes between.

        `ordinal` is none that an earlier stage served.
        """
        place = self.names.index(name)
        assert ordinal >= self._base[place]
        block, earlier = divmod(int(ordinal - self._base[place]), int(self._counts[place]))
        offset = np.flatnonzero(self._block(block)[0] == place)[earlier]
        return self._start + block * MIXTURE_BLOCK + int(offset) + 1

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each position of a mixture block: its source, and how often that source came earlier in the block.

        Counting what came earlier, rather than taking the permuted slot for the ordinal, is what lets a stage end in
        the middle of a block: what the block has served by then is always the source's first ordinals.
        """
        assert self._counts.any(), "a mixture without sources serves no position"
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


def effective_weights(
    weights: Mapping[str, float], tokens: Mapping[str, int], temperature: float | None
) -> dict[str, float]:
    """The weights of a stage's sources after the temperature; without one, as they are.

    With temperature t, sources are served in proportion to (weight x tokens) ** (1 / t): 1 reads all data at one pace,
    more favours the small sources (Conneau and Lample 2019, "Cross-lingual language model pretraining", section 3.1,
    where alpha is 1 / t; Arivazhagan et al. 2019, "Massively multilingual neural machine translation in the wild").

    Args:
        weights: of the stage's sources, by name.
        tokens: of each of them, and perhaps of others.
        temperature: positive, or None.
    """
    if temperature is None:
        return dict(weights)
    sizes = {name: weight * tokens[name] for name, weight in weights.items()}
    largest = max(sizes.values(), default=0.0) or 1.0  # powers of ratios do not overflow
    powers = {name: (size / largest) ** (1 / temperature) for name, size in sizes.items()}
    total = sum(powers.values()) or 1.0
    return {name: power / total for name, power in powers.items()}
