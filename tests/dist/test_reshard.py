"""A checkpoint of any layout loads into any other: tensor, sequence and expert degrees, ZeRO stages, offload."""

from typing import Any

import pytest
import torch

from tests.dist.harness import run_cases

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_cases("tests.dist.reshard_cases", 4, tmp_path_factory.mktemp("reshard"))


def test_the_same_layout_goes_on_bit_for_bit(results: dict[str, Any]) -> None:
    resumed = [case.split(" from ") for case in results if " from " in case]
    same = [undisturbed for undisturbed, source in resumed if undisturbed.split()[1] == source]
    assert len(same) == 10
    for undisturbed in same:
        layout = undisturbed.split()[1]
        assert results[f"{undisturbed} from {layout}"] == results[undisturbed][2:], undisturbed


def test_another_layout_goes_on_as_the_first_would(results: dict[str, Any]) -> None:
    resumed = [(case, *case.split(" from ")) for case in results if " from " in case]
    across = [found for found in resumed if found[1].split()[1] != found[2]]
    assert len(across) == 10
    for case, target, source in across:
        expected = results[f"{target.split()[0]} {source}"][2:]
        torch.testing.assert_close(torch.tensor(results[case]), torch.tensor(expected), rtol=1e-5, atol=0, msg=case)
