"""fp16 with dynamic loss scaling on two ranks: layouts agree, and an overflow is skipped by all of them."""

import math
from typing import Any

import pytest
import torch

from tests.dist.harness import run_cases

pytestmark = pytest.mark.slow
LAYOUTS = ["zero1", "zero2-tp2", "zero3", "zero3-tp2", "zero2-offload"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_cases("tests.dist.fp16_cases", 2, tmp_path_factory.mktemp("fp16"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_curve_is_that_of_fp32(results: dict[str, Any], layout: str) -> None:
    """To 1e-3: the loss scale is taken out of loss and norm."""
    torch.testing.assert_close(torch.tensor(results[layout]), torch.tensor(results["fp32"]), rtol=1e-3, atol=0)


def test_mixture_of_experts(results: dict[str, Any]) -> None:
    torch.testing.assert_close(torch.tensor(results["moe"]), torch.tensor(results["moe fp32"]), rtol=1e-2, atol=0)


@pytest.mark.parametrize("layout", ["zero1", "zero3", "zero2-offload"])
def test_a_step_that_raises_the_scale_unscales_by_the_old_one(results: dict[str, Any], layout: str) -> None:
    assert results[f"growing {layout}"] == pytest.approx(results["growing fp32"], rel=1e-3)


@pytest.mark.parametrize("layout", ["zero2-tp2", "zero3", "moe"])
def test_overflow_is_skipped_by_all(results: dict[str, Any], layout: str) -> None:
    found = results[f"overflow {layout}"]
    assert not any(math.isfinite(norm) for norm in found["norms"])
    assert found["unchanged"]
    assert found["skipped"] == 3
    # The first overflow only uses up the hysteresis of 2; each later one halves the scale, on every rank alike.
    assert found["scales"] == [2.0**58] * 2
    assert found["saved_scale"] == 2.0**58
    fp32 = results["moe fp32" if layout == "moe" else "fp32"]
    torch.testing.assert_close(torch.tensor(found["then"]), torch.tensor(fp32[0]), rtol=1e-2, atol=0)
