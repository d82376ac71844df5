"""A checkpoint of any layout loads into any other: tensor, sequence and expert degrees, ZeRO stages, offload."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import checkpoint_path, read_weights
from tests.dist.harness import run_cases

pytestmark = pytest.mark.slow


SAVED_AFTER = 2
MOE_BF16 = ("ep2-zero3", "ep2-tp4-zero3", "ep2-zero2", "tp2-zero3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reshard")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return run_cases("tests.dist.reshard_cases", 4, folder)


def test_the_same_layout_goes_on_bit_for_bit(results: dict[str, Any]) -> None:
    resumed = [case.split(" from ") for case in results if " from " in case]
    same = [undisturbed for undisturbed, source in resumed if undisturbed.split()[1] == source]
    assert len(same) == 14
    for undisturbed in same:
        layout = undisturbed.split()[1]
        assert results[f"{undisturbed} from {layout}"] == results[undisturbed][2:], undisturbed


def test_another_layout_goes_on_as_the_first_would(results: dict[str, Any]) -> None:
    resumed = [(case, *case.split(" from ")) for case in results if " from " in case]
    across = [found for found in resumed if found[1].split()[1] != found[2]]
    assert len(across) == 14
    for case, target, source in across:
        expected = results[f"{target.split()[0]} {source}"][2:]
        torch.testing.assert_close(torch.tensor(results[case]), torch.tensor(expected), rtol=1e-2 if "bf16" in case else 1e-5, atol=0)


def test_routers_have_the_same_gradient_on_every_layout(results: dict[str, Any], folder: Path) -> None:
    """By Adam's first moments, which unlike its updates know the gradient's size."""
    moments = {
        layout: read_weights(checkpoint_path(folder / "moe-bf16" / layout, SAVED_AFTER), "exp_avg") for layout in MOE_BF16
    }
    reference = moments.pop("ep2-zero2")
    routers = [name for name in reference if name.endswith("router.weight")]
    assert len(routers) == 2
    for layout, found in moments.items():
        for name in routers:
            assert (found[name] - reference[name]).norm() <= 0.05 * reference[name].norm(), (layout, name)
