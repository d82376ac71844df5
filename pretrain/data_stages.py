"""A run's data, stage by stage: which samples the batch of each step has, in closed form.

A stage is a stretch of steps with one mixture, one sequence length and one rule for batch sizes. Nothing is replayed:
the batches of a stage come in stretches of equal ones, of which there are as many as its ramp has entries and as
ranges of positions are left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.order import Stage

Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Place:
    """Between two steps: what has been consumed so far."""

    step: int = 0
    """Optimizer steps made."""
    position: int = 0
    """Samples, with those that were left out: the argument of the sample order."""
    tokens: int = 0
    """Input tokens; a sample counts with the sequence length of its time."""


@dataclass(frozen=True)
class DataStage:
    """What is in force from a place on. `ramp`: (tokens, size) pairs, as `BatchConfig` has it."""

    begin: Place
    weights: dict[str, float]
    sequence_length: int
    global_batch_size: int
    ramp: tuple[tuple[int, int], ...]
    max_epochs: dict[str, int] = field(default_factory=dict)
    """Of the sources that have an end, see `data_pipeline.order.Stage`."""

    def batch_size(self, tokens: int) -> int:
        """The global batch, in samples, of the step that begins after `tokens` tokens."""
        return next((size for end, size in self.ramp if tokens < end), self.global_batch_size)

    def as_event(self) -> dict[str, Any]:
        """What events.jsonl keeps of it."""
        return {
            "step": self.begin.step,
            "position": self.begin.position,
            "weights": self.weights,
            "sequence_length": self.sequence_length,
            "global_batch_size": self.batch_size(self.begin.tokens),
            "max_epochs": self.max_epochs,
        }

    def in_words(self) -> str:
        """The line for a person."""
        total = sum(self.weights.values())
        mixture = ", ".join(f"{100 * weight / total:.3g} % {name}" for name, weight in self.weights.items())
        size = self.batch_size(self.begin.tokens)
        caps = "".join(f"; {name} at most {epochs} times" for name, epochs in self.max_epochs.items())
        return f"from step {self.begin.step + 1} on: {size} x {self.sequence_length:,} tokens a step, {mixture}{caps}"

    def continues(self, other: "DataStage") -> bool:
        """Whether it only says again what the other says."""
        return self.same_samples(other) and (self.global_batch_size, self.ramp) == (other.global_batch_size, other.ramp)

    def same_samples(self, other: "DataStage") -> bool:
        """Whether the sample order is that of the other stage."""
        own, others = ((stage.weights, stage.sequence_length, stage.max_epochs) for stage in (self, other))
        return own == others


@dataclass(frozen=True)
class Stretch:
    """`steps` steps (None: without end) whose batches of `size` samples follow each other without a gap."""

    begin: Place
    first: int
    """Position of the first sample: behind `begin.position` where samples are left out."""
    size: int
    sequence_length: int
    steps: int | None

    def after(self, steps: int) -> Place:
        """The place after so many of its steps."""
        if not steps:
            return self.begin
        return Place(
            self.begin.step + steps,
            self.first + steps * self.size,
            self.begin.tokens + steps * self.size * self.sequence_length,
        )


def next_position(position: int, size: int, left_out: Ranges) -> int:
    """Where a batch of `size` samples begins that could begin at `position`: behind every range that it would touch."""
    for start, end in sorted(left_out):
        if position < end and position + size > start:
            position = end
    return position


def stretches(stage: DataStage, place: Place, left_out: Ranges) -> Iterator[Stretch]:
    """The stage's batches from a place on, as if the stage had no end. left_out: ranges [start, end) of positions."""
    while True:
        size = stage.batch_size(place.tokens)
        first = next_position(place.position, size, left_out)
        ends = [
            -(-(end - place.tokens) // (size * stage.sequence_length)) for end, _ in stage.ramp if place.tokens < end
        ]
        ends += [(start - first) // size for start, _ in left_out if start >= first + size]
        stretch = Stretch(place, first, size, stage.sequence_length, min(ends, default=None))
        yield stretch
        if stretch.steps is None:
            return
        place = stretch.after(stretch.steps)


def place_at_step(stage: DataStage, place: Place, left_out: Ranges, step: int) -> Place:
    """The place before step `step + 1`, if the stage lasts so long; `place` itself if it is there already."""
    for stretch in stretches(stage, place, left_out):
        wanted = max(0, step - stretch.begin.step)
        if stretch.steps is None or wanted <= stretch.steps:
            return stretch.after(wanted)
    raise AssertionError("the last stretch has no end")


def place_at_tokens(stage: DataStage, place: Place, left_out: Ranges, tokens: int) -> Place:
    """The first place after at least so many tokens, if the stage lasts so long."""
    for stretch in stretches(stage, place, left_out):
        missing = max(0, tokens - stretch.begin.tokens)
        wanted = -(-missing // (stretch.size * stretch.sequence_length))
        if stretch.steps is None or wanted <= stretch.steps:
            return stretch.after(wanted)
    raise AssertionError("the last stretch has no end")


def batches(stages: Sequence[DataStage], place: Place, left_out: Ranges) -> Iterator[tuple[int, int]]:
    """(first position, size) of every global batch from a place on; it does not end by itself."""
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        if following is not None and following.begin.step <= place.step:
            continue
        for stretch in stretches(stage, place, left_out):
            steps = stretch.steps
            if following is not None:
                rest = following.begin.step - stretch.begin.step
                steps = rest if steps is None else min(steps, rest)
            number = 0
            while steps is None or number < steps:
                yield stretch.first + number * stretch.size, stretch.size
                number += 1
            place = stretch.after(number)
            if following is not None and place.step == following.begin.step:
                break


def stage_of(stages: Sequence[DataStage], step: int) -> DataStage:
    """The stage of step `step + 1`."""
    return max((stage for stage in stages if stage.begin.step <= step), key=lambda stage: stage.begin.step)


def order_stages(stages: Sequence[DataStage]) -> list[Stage]:
    """What the sample order is to know of them: changes of batch sizes are none to it."""
    kept: list[DataStage] = []
    for stage in stages:
        if kept and kept[-1].begin.position == stage.begin.position:
            kept.pop()  # no sample was read by it
        if not kept or not stage.same_samples(kept[-1]):
            kept.append(stage)
    return [Stage(stage.begin.position, stage.weights, stage.sequence_length, stage.max_epochs) for stage in kept]
