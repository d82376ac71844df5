"""How gradients are sent changes no bit between two ranks, whose sums have one order; nor does `deterministic`."""

from typing import Any

import pytest

from tests.dist.harness import run_cases

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_cases("tests.dist.communication_cases", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("how", ["small", "small, overlapped", "deterministic"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_no_bit_changes(results: dict[str, Any], kind: str, stage: int, how: str) -> None:
    assert results[f"{kind} zero{stage} {how}"] == results[f"{kind} zero{stage} derived"]
