"""Cases for test_regions.py: the same steps with a clock and without, on two ranks."""

from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config import RunConfig
from pretrain.device import detect
from pretrain.engine import Engine, agree, build_engine
from pretrain.parallel_dims import ParallelDims
from pretrain.regions import RegionClock
from tests.dist.layout_case import LayoutCase
from tests.small_run import rank_batches

DEVICE = detect()
STAGES = {
    "zero1": LayoutCase(world=2, zero_stage=1, precision="bf16"),
    "zero3": LayoutCase(world=2, zero_stage=3),
}


class Operators(TorchDispatchMode):
    """Counts operators by name, and by region if a clock tells it."""

    def __init__(self, clock: RegionClock | None = None) -> None:
        super().__init__()
        self.clock = clock
        self.calls: Counter[str] = Counter()
        self.regions: dict[str, set[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        if self.clock is not None:
            self.regions.setdefault(name, set()).add(self.clock.region)
        return func(*args, **(kwargs or {}))


def step(engine: Engine, config: RunConfig, number: int) -> list[float]:
    """[loss, grad_norm]"""
    status = agree(engine.train_step(rank_batches(config, number, dist.get_rank(), dist.get_world_size()), lr=1e-3))
    return [status.loss, status.grad_norm]


def steps(case: LayoutCase) -> dict[str, Any]:
    """Three steps of two engines, one of which is timed in the second: curves, how often each operator was called in
    the second and the third, and in which regions of the timed step."""
    config = case.config
    found: dict[str, Any] = {}
    for name in ("plain", "timed"):
        engine, clock = build_engine(config, DEVICE, ParallelDims.of_this_rank(config)), RegionClock(DEVICE)
        curve, counts = [step(engine, config, 0)], []
        for number in (1, 2):
            timed = name == "timed" and number == 1
            if timed:
                clock.begin(number)
            with engine.timed(clock) if timed else nullcontext(), Operators(clock if timed else None) as operators:
                curve.append(step(engine, config, number))
            if timed:
                clock.end()
                found["regions"] = {called: sorted(regions) for called, regions in operators.regions.items()}
                found["host_ns"] = clock.steps[0].host_ns
            counts.append(operators.calls)
        found[name] = {"curve": curve, "counts": counts}
    return found


CASES = {name: partial(steps, case) for name, case in STAGES.items()}
