"""What a step does that another does not, operator by operator: DeepSpeed's part of Steppe's step."""

from collections.abc import Callable, Mapping
from typing import Any

LEAST_SECONDS = 1e-3


def operator_costs(run_steps: Callable[[int], object], steps: int) -> dict[str, dict[str, float]]:
    """`seconds` and `calls` a step of each operator, its own time without that of those it calls, on the device where
    there is one; from torch's profiler, after one step without it."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import profile, supported_activities

    run_steps(1)
    with profile(activities=list(supported_activities())) as profiler:
        run_steps(steps)
    on_device = torch.accelerator.is_available()
    return {
        event.key: {
            "seconds": (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6 / steps,
            "calls": event.count / steps,
        }
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CPU  # a kernel's time is its operator's already
    }


def surplus(
    ours: Mapping[str, Mapping[str, float]], bare: Mapping[str, Mapping[str, float]], most: int = 10
) -> list[dict[str, Any]]:
    """The operators that take longer in ours than in the bare loop, by how many seconds and with how many calls more a
    step, the longest first; without those of less than a millisecond. Where no call is added, it is the same work in
    other memory, or the machine's noise."""
    none = {"seconds": 0.0, "calls": 0.0}
    more: list[dict[str, Any]] = [
        {"operator": name, **{key: cost[key] - bare.get(name, none)[key] for key in none}}
        for name, cost in ours.items()
    ]
    longest = sorted(more, key=lambda item: item["seconds"], reverse=True)[:most]
    return [item for item in longest if item["seconds"] >= LEAST_SECONDS]
