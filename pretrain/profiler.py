"""`--profile`: some steps of an attempt under torch's profiler and a clock of regions, told in a table and in files."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch.autograd import DeviceType

from pretrain.device import device_name
from pretrain.engine import Engine
from pretrain.meter import Meter
from pretrain.parallel_dims import ParallelDims
from pretrain.profile_request import WARM_UP_STEPS, ProfileRequest
from pretrain.profile_table import in_words
from pretrain.recorder import Recorder
from pretrain.regions import REGIONS, SPAN, Region, RegionClock, untimed
from pretrain.run_dir import RunDir, write_json

TOP_OPERATORS = 10
NOT_OF_TRAINING: tuple[Region, ...] = ("checkpoint", "validation")  # MFU is not measured over these


class Profiler(Protocol):
    """What the loop tells."""

    def begin(self, step: int) -> None:
        """A step begins, and the one before is over."""

    def at(self, region: Region) -> None:
        """What follows belongs to this region."""

    def end(self) -> None:
        """The last step is over."""


class NoProfiler:
    """Nothing is measured."""

    def begin(self, step: int) -> None: ...

    def at(self, region: Region) -> None: ...

    def end(self) -> None: ...


class StepProfiler:
    """Profiles the steps asked for after those that warm up, on one rank, without a word to the others.

    Writes into RUN/profile/step_N, N being the first step: `trace_rank_K.json`, if a trace of this rank is asked for,
    and rank 0 `regions.json`; rank 0 also tells the table.
    """

    def __init__(
        self,
        request: ProfileRequest,
        run_dir: RunDir,
        engine: Engine,
        meter: Meter,
        recorder: Recorder,
        dims: ParallelDims,
    ) -> None:
        self.request, self.run_dir, self.dims = request, run_dir, dims
        self.engine, self.meter, self.recorder = engine, meter, recorder
        self._at: Callable[[Region], None] = untimed
        self._begun = 0
        self._after = WARM_UP_STEPS + request.steps + 1  # of the steps that begin, the first that is not profiled again
        self._clock = RegionClock(engine.device)
        self._engine_timed = ExitStack()

    def begin(self, step: int) -> None:
        """See Profiler."""
        self._begun += 1
        if self._begun == WARM_UP_STEPS + 1:
            self._start()
        elif self._begun == self._after:
            self._finish()
        if WARM_UP_STEPS < self._begun < self._after:
            self._clock.begin(step)

    def at(self, region: Region) -> None:
        """See Profiler."""
        self._at(region)

    def end(self) -> None:
        """See Profiler."""
        if self._begun <= WARM_UP_STEPS:
            self.recorder.event("profile", f"nothing was profiled: the run ended before step {WARM_UP_STEPS + 1} of it")
        elif self._begun < self._after:
            self._finish()

    def _start(self) -> None:
        self._trace = torch.profiler.profile(activities=torch.profiler.supported_activities())
        self._trace.start()
        self._engine_timed.enter_context(self.engine.timed(self._clock))
        self._tokens, self._flops = self.meter.tokens, self.meter.flops
        self._at = self._clock.at

    def _finish(self) -> None:
        """Stop, write and tell. What cannot be written does not end the run."""
        self._clock.end()
        self._at = untimed
        self._engine_timed.close()
        self._trace.stop()
        facts = self._facts()
        folder = self.run_dir.profiles / f"step_{facts['steps'][0]['step']}"
        say = in_words(facts, str(folder))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.dims.rank in self.request.ranks:
                self._trace.export_chrome_trace(str(folder / f"trace_rank_{self.dims.rank}.json"))
            if self.dims.rank == 0:
                write_json(folder / "regions.json", facts)
        except OSError as error:
            say += f"\nthe profile could not be written: {error}"
        del self._trace  # every operator of these steps: the run goes on without
        print(say, flush=True)  # into this rank's log
        self.recorder.event("profile", say, step=facts["steps"][0]["step"], path=str(folder))

    def _facts(self) -> dict[str, Any]:
        """What regions.json holds: nanoseconds of each step and of all of them by region, MFU, operators."""
        steps = self._clock.steps
        by_region = {}
        for region in REGIONS:
            on_device = [step.device_ns[region] for step in steps if region in step.device_ns]
            host_ns = sum(step.host_ns[region] for step in steps)
            by_region[region] = {"host_ns": host_ns, "device_ns": sum(on_device) if on_device else None}
        return {
            "device": device_name(self.engine.device),
            "rank": self.dims.rank,
            "ranks": self.dims.layout.world,
            "steps": [asdict(step) for step in steps],
            "regions": by_region,
            "mfu": self._mfu(),
            "operators": self._operators(),
        }

    def _mfu(self) -> dict[str, Any]:
        """Of all ranks, over the time of these steps but for NOT_OF_TRAINING."""
        steps, tokens, flops = self._clock.steps, self.meter.tokens - self._tokens, self.meter.flops - self._flops
        spent_ns = sum(step.wall_ns - sum(step.host_ns[region] for region in NOT_OF_TRAINING) for step in steps)
        return {
            "mfu": flops / (spent_ns / 1e9) / self.meter.peak,
            "tokens_per_second": tokens / (spent_ns / 1e9),
            "flops_per_token": flops / tokens,
            "peak_flops_per_second": self.meter.peak,
            "peak_source": self.meter.peak_source,
        }

    def _operators(self) -> list[dict[str, Any]]:
        """Those that took most time of their own: of the device's where it has a clock, else of the host's."""
        events = [e for e in self._trace.key_averages() if e.device_type == DeviceType.CPU and SPAN not in e.key]
        on_device = any(event.self_device_time_total for event in events)
        events.sort(key=lambda e: e.self_device_time_total if on_device else e.self_cpu_time_total, reverse=True)
        return [
            {
                "name": event.key,
                "calls": event.count,
                "host_ns": round(event.self_cpu_time_total * 1e3),
                "device_ns": round(event.self_device_time_total * 1e3) if on_device else None,
            }
            for event in events[:TOP_OPERATORS]
        ]


def open_profiler(
    request: ProfileRequest | None,
    run_dir: RunDir,
    engine: Engine,
    meter: Meter,
    recorder: Recorder,
    dims: ParallelDims,
) -> Profiler:
    """What profiles this rank: rank 0, and those of which a trace is asked for."""
    if request is None or dims.rank not in {0, *request.ranks}:
        return NoProfiler()
    return StepProfiler(request, run_dir, engine, meter, recorder, dims)
