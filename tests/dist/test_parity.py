"""Every layout is the same model: loss, gradient norm and weights of each equal plain torch's on one rank.

The layouts are those of `layouts.py`; `-k NAME` runs one of them alone. What is compared comes from 5 steps on the same
global batches, with valid targets that fall unequally on samples (the last sample has none) and clipping active.

fp32: 1e-5, relative on the loss and norm of each step, absolute on every weight after them.

bf16: the oracle has bf16 copies of fp32 masters too, and rounds in other places. 1e-3 on the loss; 1e-2 on the norm,
which rounding of many small gradients moves. Adam's first steps are the gradient's sign, and where a gradient is near 0
its sign is rounding's: so on the weights not element by element, but 10 % of the way that each tensor went. Muon makes
all singular values of an update alike, those that are rounding's too: 50 % of the way, so that there the curve decides.
With experts 20 %, since rounding sends a token to another expert now and then.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint.read import read_weights
from pretrain.engine import build_decoder
from pretrain.engine_torch import TorchEngine
from tests.dist.harness import finished_cases, run_cases
from tests.dist.layout_case import LayoutCase
from tests.dist.layouts import LONG, MATRIX
from tests.dist.parity_cases import trained

# The first test of a world waits for all its layouts; those of `make test-long` take some twenty minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
Results = Callable[[int, str], Any]
CPU = torch.device("cpu")
CRASHES = 3  # after so many the rest of a world's layouts is given up: starting ranks again costs seconds each time


def run_all(cases: Sequence[LayoutCase], world: int, folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The result of each case by name. Ranks that a case ended are started again for those after it."""
    found: dict[str, Any] = {}
    for attempt in range(CRASHES):
        left = [case for case in cases if case.name not in found]
        if not left:
            break
        patch.setenv("PARITY_CASES", json.dumps([asdict(case) for case in left]))
        part = folder / f"world{world}-{attempt}"
        part.mkdir()
        try:
            found |= run_cases("tests.dist.parity_cases", world, part)
        except AssertionError as error:
            found |= finished_cases(part)
            culprit = next(case.name for case in left if case.name not in found)
            found[culprit] = {"error": str(error)}
    not_run = {"error": f"not run, as {CRASHES} others ended the ranks"}
    return {case.name: found.get(case.name, not_run) for case in cases}


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    """Results of the cases that this session selected, by world and name; each world's ranks are started once."""
    chosen: dict[int, list[LayoutCase]] = {}
    for item in request.session.items:
        if item.path == request.path:
            case = item.callspec.params["case"]  # type: ignore[attr-defined]
            chosen.setdefault(case.world, []).append(case)
    folder = tmp_path_factory.mktemp("parity")
    with pytest.MonkeyPatch.context() as patch:
        by_world = functools.cache(lambda world: run_all(chosen[world], world, folder, patch))

        def result_of(world: int, name: str) -> Any:
            result = by_world(world)[name]
            if "error" in result:
                pytest.fail(f"{name}:\n{result['error']}", pytrace=False)
            return result

        yield result_of


@functools.cache
def oracle(case: LayoutCase) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Plain torch on one rank: what it learns, its weights before and after."""
    config = case.config
    engine = TorchEngine(build_decoder(config, CPU, torch.float32), config, CPU)
    before = {piece.name: piece.views["fp32"].clone() for piece in engine.pieces()}
    result = trained(engine, config, data_rank=0, data_world=1)
    return result, before, {piece.name: piece.views["fp32"] for piece in engine.pieces()}


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=case.name) for case in MATRIX),
        *(pytest.param(case, id=case.name, marks=pytest.mark.long) for case in LONG),
    ],
)
def test_every_layout_is_the_same_model(results: Results, case: LayoutCase) -> None:
    found = results(case.world, case.name)
    expected, before, after = oracle(case.oracle)
    curve, expected_curve = torch.tensor(found["curve"]), torch.tensor(expected["curve"])
    weights = read_weights(Path(found["path"]))
    assert weights.keys() == after.keys()
    if case.precision == "fp32":
        torch.testing.assert_close(curve, expected_curve, rtol=1e-5, atol=0)
        for name, weight in weights.items():
            error = (weight - after[name]).abs().max()
            limit = 0.0 if name.endswith("router.bias") else 1e-5
            assert error <= limit, f"{name} is off by {error:.1e}"
        assert found["expert_load"] == expected["expert_load"]
    else:
        torch.testing.assert_close(curve[:, 0], expected_curve[:, 0], rtol=1e-3, atol=0)
        torch.testing.assert_close(curve[:, 1], expected_curve[:, 1], rtol=1e-2, atol=0)
        allowed = 0.5 if case.optimizer == "muon" else 0.1 if case.model == "dense" else 0.2
        for name, weight in weights.items():
            if not name.endswith("router.bias"):  # which moves by the sign of a load that a token tips
                assert (weight - after[name]).norm() <= allowed * (after[name] - before[name]).norm(), name
