"""What regions.json holds of a profile that was never made."""

from typing import Any

from pretrain.regions import REGIONS


def made_up_profile(first: int, on_device: bool = False) -> dict[str, Any]:
    """Two steps of one second each, .6 of it backward, .4 forward; on a device, half of that."""

    def regions(seconds: float) -> dict[str, int]:
        spent = {"forward": 0.4, "backward": 0.6}
        return {region: round(spent.get(region, 0) * seconds * 1e9) for region in REGIONS}

    steps = [{"step": first + i, "wall_ns": 10**9, "host_ns": regions(1), "device_ns": {}} for i in range(2)]
    device = regions(1) if on_device else dict.fromkeys(REGIONS)
    return {
        "device": "made up",
        "rank": 0,
        "ranks": 4,
        "steps": steps,
        "regions": {name: {"host_ns": ns, "device_ns": device[name]} for name, ns in regions(2).items()},
        "mfu": {
            "mfu": 0.25,
            "tokens_per_second": 1e6,
            "flops_per_token": 2.5e8,
            "peak_flops_per_second": 1e15,
            "peak_source": "made up",
        },
        "operators": [
            {"name": "aten::mm", "calls": 7, "host_ns": 10**9, "device_ns": 5 * 10**8 if on_device else None}
        ],
    }
