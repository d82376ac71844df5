"""The order of the samples, as a pure function of the position: (seed, stages, position) -> (source, epoch, sample).

Nothing but the position is ever stored. The number of ranks, the micro-batch and a resume do not enter.

Two levels. The *mixture* says which source serves a position, and how many of its samples were served before: its
*ordinal*. The *source order* says which sample the ordinal is. A stage changes the weights or the sequence length at
any position, and a source that has been read often enough leaves the mixture; nothing is lost or repeated by either.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data_pipeline.mixture import Mixture
from data_pipeline.samples import Extents
from data_pipeline.source_order import OrderedSource, SourceOrder


@dataclass(frozen=True)
class Stage:
    """From position `start` on, sources are mixed by these weights. A source that is not named has none."""

    start: int
    weights: dict[str, float]
    sequence_length: int
    """T: the most tokens of a sample."""
    max_epochs: dict[str, int] = field(default_factory=dict)
    """Epochs after which a source has no weight any more, counted over all stages. Part of the stage, so that a later
    change of mind leaves alone what was served before. A source that is not named has no end."""


@dataclass(frozen=True)
class Picked:
    """Who serves each of n positions: int64 arrays `(n,)` each."""

    source: np.ndarray
    """Place in `SampleOrder.sources`."""
    epoch: np.ndarray
    """Of that source."""
    cut: np.ndarray
    """Which of the source's ways of being cut the number is of, see `SampleOrder.extents`."""
    number: np.ndarray


@dataclass(frozen=True)
class Consumed:
    """What a source has served. Of one that is no longer given, only the samples are known."""

    samples: int
    tokens: int | None
    """That fed the model."""
    epochs: float | None


class SampleOrder:
    """See the module. Equal arguments give equal orders, on any machine; sources are known by name, never by place."""

    def __init__(
        self, sources: Mapping[str, OrderedSource], group_blocks: int, seed: int, stages: Sequence[Stage]
    ) -> None:
        """Describe the order.

        Args:
            sources: by name.
            group_blocks: K, shuffle blocks whose samples are shuffled among each other.
            seed: of the run.
            stages: by ascending start, the first at position 0. A stage may start anywhere: sources go on from where
                they were.

        Raises:
            ValueError: the stages are out of order, name an unknown or empty source, have an unusable weight, or a
                source cannot be cut for a stage's sequence length.
        """
        self.sources = tuple(sorted(sources))
        """What the numbers in `Picked.source` stand for."""
        self._orders = {name: SourceOrder(name, sources[name], group_blocks, seed) for name in self.sources}
        self._seed = seed
        starts = [stage.start for stage in stages]
        if not starts or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
            raise ValueError(f"stages start at {starts}, but the first must start at 0 and each later than the last")
        for name in stages[-1].weights:
            if name not in sources:
                raise ValueError(
                    f"the mixture names source {name!r}, which is not among data.sources: remove it or give it data"
                )
        self._stages: list[Stage] = []
        self._mixtures: list[Mixture] = []
        consumed: dict[str, int] = {}
        for stage, end in itertools.zip_longest(stages, starts[1:]):
            consumed = self._add(stage, consumed, end)
        self._starts = np.array([stage.start for stage in self._stages])

    def _add(self, stage: Stage, consumed: dict[str, int], end: int | None) -> dict[str, int]:
        """Add a stage, and those that begin because a source leaves it before `end`. Samples consumed before `end`."""
        while True:
            served, leaving = self._served(stage, consumed)
            mixture = Mixture(stage.start, served, consumed, self._seed)
            self._stages.append(replace(stage, weights=served))
            self._mixtures.append(mixture)
            leaves = min((mixture.position_after(name, last) for name, last in leaving.items()), default=end)
            if leaves is None or (end is not None and leaves >= end):
                return mixture.consumed_before(end) if end is not None else {}
            consumed = mixture.consumed_before(leaves)
            stage = replace(stage, start=leaves)

    def _served(self, stage: Stage, consumed: dict[str, int]) -> tuple[dict[str, float], dict[str, int]]:
        """Weights of the sources of a stage that are not at their end, and the last ordinals of those that have one."""
        if not stage.weights:
            raise ValueError("a stage of the mixture has no source: give at least one a weight")
        served, leaving = dict(stage.weights), {}
        for name in sorted(stage.weights):
            if name in self._orders:
                self._orders[name].recut(consumed.get(name, 0), stage.sequence_length)
            if name in stage.max_epochs:
                if name not in self._orders:
                    raise ValueError(
                        f"source {name!r} was to be read {stage.max_epochs[name]} times at most, but is not among "
                        "data.sources now: keep it there, if without weight, since its end shaped the order"
                    )
                last = self._orders[name].end_of(stage.max_epochs[name]) - 1
                if last < consumed.get(name, 0):
                    del served[name]
                else:
                    leaving[name] = last
        return served, leaving

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What holds from each position on, with the stages that begin where a source leaves.

        A source that has left has no weight; a stage without weights begins where none is left.
        """
        return tuple(self._stages)

    @property
    def ends_at(self) -> int | None:
        """The first position without a sample, since no source is left; None: there is none."""
        return next((stage.start for stage in self._stages if not stage.weights), None)

    def samples(self, positions: np.ndarray) -> Picked:
        """Who serves these positions `(n,)`. Cheapest for many positions a call.

        Raises:
            ValueError: a position is past the end of all sources, or belongs to an earlier stage that used a source
                which is no longer given.
        """
        positions = np.asarray(positions, dtype=np.int64)
        source, epoch, cut, number = (np.empty(len(positions), dtype=np.int64) for _ in range(4))
        stage_of = np.searchsorted(self._starts, positions, side="right") - 1
        for stage in np.unique(stage_of).tolist():
            in_stage = np.flatnonzero(stage_of == stage)
            if not self._stages[stage].weights:
                raise ValueError(
                    f"position {positions[in_stage[0]]} has no sample: at position {self._stages[stage].start} all "
                    "sources were read max_epochs times; raise it, or train for fewer steps"
                )
            mixture = self._mixtures[stage]
            place, ordinal = mixture.ordinals(positions[in_stage])
            for named in np.unique(place).tolist():
                name = mixture.names[named]
                if name not in self._orders:
                    raise ValueError(f"source {name!r} served these positions, but is not among data.sources now")
                chosen = place == named
                at = in_stage[chosen]
                source[at] = self.sources.index(name)
                epoch[at], cut[at], number[at] = self._orders[name].pick(ordinal[chosen])
        return Picked(source, epoch, cut, number)

    def extents(self, source: int, cut: int, numbers: np.ndarray) -> Extents:
        """Where the tokens of samples of one source and one cut lie, as `samples` gave them: numbers `(n,)`.

        Raises:
            ValueError: a file that says so is damaged.
        """
        return self._orders[self.sources[source]].extents(cut, numbers)

    def sequence_length_at(self, position: int) -> int:
        """T of the stage that the position belongs to."""
        return self._stages[int(np.searchsorted(self._starts, position, side="right")) - 1].sequence_length

    def consumed_before(self, position: int) -> dict[str, Consumed]:
        """What each source that had a weight so far has served at the positions below this one."""
        stage = int(np.searchsorted(self._starts, max(position - 1, 0), side="right")) - 1
        consumed = {}
        for name, samples in self._mixtures[stage].consumed_before(position).items():
            known = name in self._orders
            tokens, epochs = self._orders[name].consumed_before(samples) if known else (None, None)
            consumed[name] = Consumed(samples, tokens, epochs)
        return consumed
