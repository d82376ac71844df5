"""A profile's table: what is shown adds up to what is shown of the whole."""

from decimal import Decimal
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pretrain.profile_table import TICK_NS, in_proportion, in_words, region_rows
from pretrain.regions import REGIONS
from tests.made_up_profile import made_up_profile

NANOSECONDS = st.lists(st.integers(0, 10**12), min_size=len(REGIONS), max_size=len(REGIONS))


def with_regions(host_ns: list[int]) -> dict[str, Any]:
    regions = {name: {"host_ns": ns, "device_ns": None} for name, ns in zip(REGIONS, host_ns, strict=True)}
    return made_up_profile(4) | {"regions": regions}


@given(st.lists(st.integers(0, 10**15), min_size=1), st.integers(0, 10**9))
def test_shares_add_up_and_each_is_rounded(parts: list[int], whole: int) -> None:
    found = in_proportion(parts, whole)
    if total := sum(parts):
        assert sum(found) == whole
        assert all(abs(share * total - part * whole) < total for share, part in zip(found, parts, strict=True))


@given(NANOSECONDS)
def test_rows_add_up_to_the_step_in_every_digit(host_ns: list[int]) -> None:
    *regions, step = region_rows(with_regions(host_ns))
    assert [row.name for row in regions] == [name for name, ns in zip(REGIONS, host_ns, strict=True) if ns]
    assert step.seconds == f"{round(sum(host_ns) / 2 / TICK_NS) / 1e4:.4f}"
    if regions:
        assert sum(Decimal(row.seconds) for row in regions) == Decimal(step.seconds)
        assert sum(Decimal(row.percent) for row in regions) == 100


def test_the_table_in_words() -> None:
    lines = in_words(made_up_profile(4), "runs/a/profile/step_4").splitlines()
    assert lines[0] == "profile of steps 4 to 5, rank 0 of 4, on made up: runs/a/profile/step_4"
    assert [line.split() for line in lines[1:6]] == [
        ["region", "s", "a", "step", "%"],
        ["forward", "0.4000", "40.0"],
        ["backward", "0.6000", "60.0"],
        ["step", "1.0000", "100.0"],
        ["operator,", "without", "those", "that", "it", "calls", "calls", "s", "a", "step", "%"],
    ]
    assert lines[6].split() == ["aten::mm", "3.5", "0.5000", "50.0"]
    assert "MFU 25.0%: 1,000,000 tokens/s" in lines[7]
    assert "of 1000.00 TFLOP/s in all (made up)" in lines[7]


def test_a_device_has_a_column_of_its_own() -> None:
    lines = in_words(made_up_profile(4, on_device=True), "here").splitlines()
    assert [line.split()[-1] for line in lines[2:5]] == ["0.2000", "0.3000", "0.5000"]
    assert lines[1].endswith("device s")
    assert lines[6].split()[-1] == "0.2500"
