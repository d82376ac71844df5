"""Where the time of a step goes: a clock that is told what is being done, and gives each moment to one region.

Regions do not nest: where one interrupts another, as reductions do a backward pass, the time is its own alone. So the
regions of a step add up to it, to the nanosecond.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch.profiler import record_function

from pretrain.device import DeviceClock

# data        waiting for batches
# forward     forward passes, with what they gather or exchange of parameters and activations; the head makes its
#             gradients in them, with the loss
# backward    backward passes, recomputation, and likewise
# reduction   of what becomes of gradients once they are there: accumulated in fp32, put into buckets, summed over ranks
# optimizer   norm, clipping, update, and the ranks' exchange of what they have updated
# agreement   what ranks count and decide together, with the wait for the slowest; the host's wait for the device
# recording   events, TensorBoard, warnings
# checkpoint  waiting for a save that is under way, starting one
# validation  scoring held-out text
# other       the rest
Region = Literal[
    "data",
    "forward",
    "backward",
    "reduction",
    "optimizer",
    "agreement",
    "recording",
    "checkpoint",
    "validation",
    "other",
]
REGIONS: tuple[Region, ...] = get_args(Region)
SPAN = "steppe: "  # begins the names of what is ours in a trace


def untimed(region: Region) -> None:
    """What is told where nothing is timed."""


@dataclass
class StepTimes:
    """Nanoseconds of a step: its wall time, and by region of the host and of the device (empty: it has no clock)."""

    step: int
    wall_ns: int = 0
    host_ns: dict[Region, int] = field(default_factory=lambda: dict.fromkeys(REGIONS, 0))
    device_ns: dict[Region, int] = field(default_factory=dict)


class RegionClock:
    """Times steps by region, and marks both in torch's trace.

    The device's time of a region is that between what its stream was asked for at the region's beginning and at its
    end; what other streams do meanwhile (reductions beside a backward pass) does not count. Not tried on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.steps: list[StepTimes] = []
        self._device = DeviceClock(device)
        self.region: Region = "other"
        self._spans: list[Any] = []  # of the step under way: its own, and its region's
        self._on_device: list[tuple[StepTimes, Region, Any, Any]] = []

    def begin(self, step: int) -> None:
        """A step begins, where the one before ends, in the region `other`."""
        if self.steps:
            self._end_step()
        else:
            self._now, self._mark = time.perf_counter_ns(), self._device.mark()
        self.steps.append(StepTimes(step))
        self._began, self.region = self._now, "other"
        self._open(f"step {step}")
        self._open("other")

    def end(self) -> None:
        """The last step ends. Waits for the device."""
        self._end_step()
        self._device.wait()
        for step, region, begin, end in self._on_device:
            step.device_ns[region] = step.device_ns.get(region, 0) + self._device.nanoseconds(begin, end)
        self._on_device.clear()

    def at(self, region: Region) -> None:
        """This region from now on, until told otherwise."""
        self._switch(region)
        self._spans.pop().__exit__(None, None, None)
        self._open(region)

    @contextmanager
    def inside(self, region: Region) -> Iterator[None]:
        """This region until the context is left, when the one before goes on. On any one thread at a time."""
        before = self.region
        self._switch(region)
        with record_function(SPAN + region):
            yield
        self._switch(before)

    def _switch(self, region: Region) -> None:
        """What has passed goes to the region that was; from now on it goes to this one."""
        now, mark, step = time.perf_counter_ns(), self._device.mark(), self.steps[-1]
        step.host_ns[self.region] += now - self._now
        if mark is not None:
            self._on_device.append((step, self.region, self._mark, mark))
        self.region, self._now, self._mark = region, now, mark

    def _end_step(self) -> None:
        self._switch("other")
        self.steps[-1].wall_ns = self._now - self._began
        while self._spans:
            self._spans.pop().__exit__(None, None, None)

    def _open(self, name: str) -> None:
        span = record_function(SPAN + name)
        span.__enter__()
        self._spans.append(span)
