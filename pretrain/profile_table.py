"""What a profile found, as a table for a person: regions that add up to the step, MFU, operators. No torch here."""

from collections.abc import Sequence
from typing import Any, NamedTuple

TICK_NS = 100_000  # seconds are shown to a tenth of a millisecond


class Row(NamedTuple):
    """A region, or an operator, as it is shown. device_seconds: empty where the device has no clock of its own."""

    name: str
    calls: str
    seconds: str
    percent: str
    device_seconds: str

    def line(self) -> str:
        """Of a table of plain text, without columns that nothing is in."""
        return (
            f"{self.name[:44]:<45}{self.calls:>10}{self.seconds:>12}{self.percent:>8}{self.device_seconds:>12}".rstrip()
        )


def in_proportion(parts: Sequence[int], whole: int) -> list[int]:
    """Whole numbers in proportion to `parts` that add up to `whole`, each off by less than 1: the largest remainders
    are rounded up (Hamilton's method)."""
    total = max(1, sum(parts))
    floors = [part * whole // total for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] * whole % total, reverse=True)
    for i in by_remainder[: whole - sum(floors)]:
        floors[i] += 1
    return floors


def region_rows(facts: dict[str, Any]) -> list[Row]:
    """The regions that had any time, in their order, and the step: the sum of the rows above it, of seconds as of
    percentages, in every digit. facts: as in regions.json."""
    regions, steps = facts["regions"], len(facts["steps"])
    host = [region["host_ns"] for region in regions.values()]
    ticks = in_proportion(host, round(sum(host) / steps / TICK_NS))
    tenths = in_proportion(host, 1000)
    found = [
        Row(name, "", _seconds(tick), f"{tenth / 10:.1f}", _on_device(region["device_ns"], steps))
        for (name, region), tick, tenth in zip(regions.items(), ticks, tenths, strict=True)
        if region["host_ns"]
    ]
    device = [region["device_ns"] for region in regions.values() if region["device_ns"] is not None]
    whole = Row("step", "", _seconds(sum(ticks)), "100.0", _on_device(sum(device) if device else None, steps))
    return [*found, whole]


def operator_rows(facts: dict[str, Any]) -> list[Row]:
    """The operators that took most time of their own. Their percentages are of the step's wall time."""
    steps, wall_ns = len(facts["steps"]), sum(step["wall_ns"] for step in facts["steps"])
    return [
        Row(
            operator["name"],
            f"{operator['calls'] / steps:,.4g}",
            _seconds(round(operator["host_ns"] / steps / TICK_NS)),
            f"{operator['host_ns'] / wall_ns * 100:.1f}",
            _on_device(operator["device_ns"], steps),
        )
        for operator in facts["operators"]
    ]


def mfu_in_words(facts: dict[str, Any]) -> str:
    """MFU, with what it is a share of and how the FLOPs are counted."""
    mfu = facts["mfu"]
    return (
        f"MFU {mfu['mfu']:.1%}: {mfu['tokens_per_second']:,.0f} tokens/s (time of checkpoints and validation left out) "
        f"at {mfu['flops_per_token'] / 1e9:.4g} GFLOP a token, of {mfu['peak_flops_per_second'] / 1e12:.2f} TFLOP/s in "
        f"all ({mfu['peak_source']}). FLOPs are counted as in PaLM, appendix B: 6 a parameter of a matrix product (of "
        "experts, of those that a token takes) and 12 L H head_size T for attention; nothing for recomputation"
    )


def in_words(facts: dict[str, Any], folder: str) -> str:
    """All of it, in lines. folder: where the files are."""
    first, last = facts["steps"][0]["step"], facts["steps"][-1]["step"]
    device = "device s" if any(region["device_ns"] is not None for region in facts["regions"].values()) else ""
    return "\n".join(
        [
            f"profile of steps {first} to {last}, rank {facts['rank']} of {facts['ranks']}, on {facts['device']}: "
            f"{folder}",
            Row("region", "", "s a step", "%", device).line(),
            *(row.line() for row in region_rows(facts)),
            Row("operator, without those that it calls", "calls", "s a step", "%", device).line(),
            *(row.line() for row in operator_rows(facts)),
            mfu_in_words(facts),
        ]
    )


def _seconds(ticks: int) -> str:
    return f"{ticks * TICK_NS / 1e9:.4f}"


def _on_device(nanoseconds: int | None, steps: int) -> str:
    return "" if nanoseconds is None else f"{nanoseconds / steps / 1e9:.4f}"
