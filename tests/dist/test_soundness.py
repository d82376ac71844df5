"""What keeps a run sound, on four ranks: an update of a gradient that is no number is left out by all of them as if it
had been asked for, and a replica that differs in one bit is named."""

import math
from typing import Any

import pytest
import torch

from tests.dist.harness import run_cases

pytestmark = pytest.mark.slow
FP32 = ["zero0-moebias", "zero0-tp2-muon", "zero1-tp2", "zero2-offload", "zero3-tp2-ep4-moebias", "zero3-offload-all"]
LAYOUTS = [*FP32, "zero1-bf16-ep2-moebias", "zero2-sp2-muon-bf16", "zero3-bf16-moebias"]
FLIPPED = ["zero0-moebias", "zero1-tp2", "zero1-bf16-ep2-moebias", "zero2-offload"]
FLIPPED += ["zero3-tp2-ep4-moebias", "zero3-bf16-moebias"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_cases("tests.dist.soundness_cases", 4, tmp_path_factory.mktemp("soundness"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_broken_steps_are_skipped_by_all_as_if_asked(results: dict[str, Any], layout: str) -> None:
    """State bit for bit as before them; the steps after them bit for bit as where they were left out on request."""
    found = results[f"skipped {layout}"]
    for broken, told in zip(found["broken"], found["told"], strict=True):
        assert broken["unchanged"] == told["unchanged"] == [True, False, True, False]
        assert broken["bits"] == told["bits"]
        assert broken["scalars"] == told["scalars"]
        assert told["scalars"]["optimizer_steps"] == told["scalars"]["counters"]["skipped_steps"] == 2
        assert str(broken["curve"]) == str(found["broken"][0]["curve"])  # of NaNs too
        assert told["curve"] == found["told"][0]["curve"]
        assert [broken["curve"][step] for step in (1, 3)] == [told["curve"][step] for step in (1, 3)]
        assert all(math.isfinite(value) for step in told["curve"] for value in step)
        assert [math.isfinite(norm) for _, norm in broken["curve"]] == [False, True, False, True]
        assert [math.isfinite(loss) for loss, _ in broken["curve"]] == [True, True, False, True]


@pytest.mark.parametrize("layout", FP32)
def test_what_is_left_is_the_oracles_run(results: dict[str, Any], layout: str) -> None:
    found = results[f"skipped {layout}"]
    curve, expected = torch.tensor(found["told"][0]["curve"]), torch.tensor(found["oracle"]["curve"])
    torch.testing.assert_close(curve, expected, rtol=1e-5, atol=0)
    assert found["oracle"]["error"] <= 1e-5


@pytest.mark.parametrize("layout", ["zero1-fp16-tp2", "zero3-fp16"])
def test_fp16_lowers_its_scale_for_an_overflow_alone(results: dict[str, Any], layout: str) -> None:
    found = results[f"scaled {layout}"]
    for steps in found["steps"]:
        sound, asked, overflow, again, then = steps
        assert [step["unchanged"] for step in steps] == [False, True, True, True, False]
        assert [math.isfinite(step["norm"]) for step in steps] == [True, True, False, False, True]
        assert sound["scaler"] == asked["scaler"]
        # The first overflow only uses up the hysteresis of 2.
        assert overflow["scaler"]["cur_scale"] == 2.0**60
        assert again["scaler"]["cur_scale"] == 2.0**59
        assert then["scaler"]["cur_iter"] == 4
    assert found["counters"]["skipped_steps"] == 3


@pytest.mark.parametrize("layout", FLIPPED)
def test_one_bit_on_one_rank_is_named(results: dict[str, Any], layout: str) -> None:
    """Of two ranks that differ, the first is taken to be right: here it is the last that is not."""
    cases = results[f"skipped {layout}"]["flipped"]
    assert cases
    for case in cases:
        sound, flipped, back = case["found"]
        assert sound == back == []
        assert flipped == [[case["name"], [case["rank"]]]]
