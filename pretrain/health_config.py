"""How a run looks after itself, and what it leaves out: two sections of its config. Free of torch."""

from typing import Annotated

from pydantic import Field, field_validator

from pretrain.section import Section


class HealthConfig(Section):
    """How a run looks after itself; `pretrain/health.py` decides, on all ranks alike.

    max_skipped_steps: steps in a row that may be skipped because a loss or gradient is not finite; fp16, which looks
        for its loss scale so, is not counted.
    spike_zscore: a loss so many robust standard deviations above the median of the last `spike_window` steps is a spike
        (0: none is): the run goes back to the last checkpoint and leaves out the data since, and the data of
        `spike_skip_steps` more steps; at most `max_rewinds` times between two checkpoints.
    replica_check_every_steps: how often ranks that hold the same parameters compare them (0: never).
    hang_seconds: without a sign of life for so long, a rank counts as hung and the attempt ends (0: never).
    straggler_ratio, straggler_every_steps: a rank is named whose forward passes take so many times the median's, looked
        at every so many steps (0: never).
    """

    max_skipped_steps: int = Field(default=3, ge=0)
    spike_zscore: float = Field(default=0.0, ge=0)
    spike_window: int = Field(default=128, ge=8, le=10_000)
    spike_skip_steps: int = Field(default=1, ge=0)
    max_rewinds: int = Field(default=3, gt=0)
    replica_check_every_steps: int = Field(default=500, ge=0)
    hang_seconds: float = Field(default=1800.0, ge=0)
    straggler_ratio: float = Field(default=1.5, gt=1)
    straggler_every_steps: int = Field(default=50, ge=0)


class SkipsConfig(Section):
    """What a run leaves out from its start on: what another run left out when it met with trouble, to repeat it.

    updates: steps (the first is 1) whose gradient is not applied. data: ranges [start, end) of positions of the sample
    order that are never read; a batch that would reach into one begins behind it.
    """

    updates: tuple[Annotated[int, Field(gt=0)], ...] = ()
    data: tuple[tuple[int, int], ...] = ()

    @field_validator("data")
    @classmethod
    def _ranges_rise(cls, data: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        ends = [0, *(end for pair in data for end in pair)]
        if any(start >= end for start, end in data) or ends != sorted(ends):
            raise ValueError(
                f"data={[list(pair) for pair in data]} must be [start, end] pairs of positions, each start below its "
                "end and none below the end before: sort and merge them"
            )
        return data
