"""The engine tells a clock where a step is: reductions apart from the backward pass, no digit changed, nothing left."""

from typing import Any

import pytest

from tests.dist.harness import run_cases

pytestmark = pytest.mark.slow
SUMMED_BY = {"zero1": "allreduce_", "zero3": "_reduce_scatter_base_"}  # what DeepSpeed sums gradients by

MARKS = ("_record_function_enter_new", "_record_function_exit")  # of a region in the trace


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_cases("tests.dist.region_cases", 2, tmp_path_factory.mktemp("regions"))


@pytest.mark.parametrize("stage", SUMMED_BY)
def test_reductions_are_told_apart_from_the_backward_pass(results: dict[str, Any], stage: str) -> None:
    """By what is called in them: gradients are summed in reductions alone, and multiplied for in passes alone."""
    regions = results[stage]["regions"]
    assert regions["mm"] == ["backward", "forward"]
    assert "reduction" in regions[SUMMED_BY[stage]]
    assert "backward" not in {*regions["allreduce_"], *regions.get("_reduce_scatter_base_", ())}
    in_step = {"forward", "backward", "reduction", "agreement", "checkpoint", "optimizer", "other"}
    assert {region for region, ns in results[stage]["host_ns"].items() if ns} == in_step


@pytest.mark.parametrize("stage", SUMMED_BY)
def test_timing_changes_no_digit_and_ends(results: dict[str, Any], stage: str) -> None:
    plain, timed = results[stage]["plain"], results[stage]["timed"]
    assert timed["curve"] == plain["curve"]
    (plain_during, plain_after), (during, after) = plain["counts"], timed["counts"]
    assert after == plain_after
    marks = {name: during.pop(name) - plain_during.pop(name) for name in MARKS}
    assert during == plain_during
    assert len(set(marks.values())) == 1
    assert min(marks.values()) > 20
