"""Every engine and ZeRO stage trains the same model as plain torch on one rank, and resumes from any other's state."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.read import read_weights
from pretrain.engine import build_decoder
from tests.dist.harness import run_cases
from tests.small_run import small_config

pytestmark = pytest.mark.slow
FP32 = ["zero0-fp32", "zero1-fp32", "zero2-fp32", "zero3-fp32", "zero2-fp32-recompute", "zero3-fp32-recompute"]
ORACLE_OF = {
    **dict.fromkeys(FP32, "torch-fp32"),
    "zero3-fp32-tied": "torch-fp32-tied",
    "zero1-fp32-z": "torch-fp32-z",
    **{f"zero{stage}-bf16": "torch-bf16" for stage in (1, 2, 3)},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Results of all cases, on one rank and on two, each run once."""

    @functools.cache
    def on(nproc: int) -> dict[str, Any]:
        return run_cases("tests.dist.engine_cases", nproc, tmp_path_factory.mktemp(f"ranks{nproc}"))

    return on


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("layout", [*ORACLE_OF, "torch-fp32"])
def test_layout_trains_the_oracles_model(results: Any, layout: str, nproc: int) -> None:
    """Loss and gradient norm of 5 steps and the weights after them; the oracle is plain torch on one rank.

    bf16 is held against an oracle that has fp32 masters too: it rounds gradients at other places, so 1e-3 on the curve.
    Adam's first steps are the gradient's sign, and where a gradient is near 0 its sign is rounding's: so on the weights
    not element by element, but 5 % of the way that each tensor went.
    """
    ours = results(nproc)[f"train {layout}"]
    oracle = results(1)[f"train {ORACLE_OF.get(layout, 'torch-fp32')}"]
    curve, expected = torch.tensor(ours["curve"]), torch.tensor(oracle["curve"])
    bf16 = layout.endswith("bf16")
    torch.testing.assert_close(curve, expected, rtol=1e-3 if bf16 else 1e-5, atol=0)
    assert ours["validation"] == pytest.approx(oracle["validation"], rel=1e-3 if bf16 else 1e-5) or nproc > 1
    weights, expected_weights = read_weights(Path(ours["path"])), read_weights(Path(oracle["path"]))
    assert weights.keys() == expected_weights.keys()
    initial = dict(build_decoder(small_config(), torch.device("cpu"), torch.float32).named_parameters())
    for name, weight in weights.items():
        if bf16:
            way = expected_weights[name] - initial[name]
            assert (weight - expected_weights[name]).norm() <= 0.05 * way.norm(), name
        else:
            torch.testing.assert_close(weight, expected_weights[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("nproc", [1, 2])
def test_the_number_of_micro_batches_may_change_at_any_step(results: Any, nproc: int) -> None:
    found = results(nproc)
    ramps = {name.removeprefix("ramp "): found[name] for name in found if name.startswith("ramp ")}
    oracle = {"fp32": torch.tensor(ramps.pop("torch-fp32")), "bf16": torch.tensor(ramps.pop("torch-bf16"))}
    assert len(ramps) == 6
    for layout, curve in ramps.items():
        precision = layout.split("-")[1]
        rtol = 1e-3 if precision == "bf16" else 1e-5
        torch.testing.assert_close(torch.tensor(curve), oracle[precision], rtol=rtol, atol=0)


@pytest.mark.parametrize("nproc", [1, 2])
def test_resume_at_the_same_layout_is_exact(results: Any, nproc: int) -> None:
    """Bit for bit: every digit of the curve, every bit of the weights."""
    found = results(nproc)
    same = [name for name in found if name.startswith("digest ")]
    assert len(same) == 9
    for name in same:
        layout = name.removeprefix("digest ")
        resumed = found[f"resume {layout} {layout}"]
        assert resumed["curve"] == found[f"train {layout}"]["curve"][2:], layout
        assert resumed["digest"] == found[name], layout


@pytest.mark.parametrize("nproc", [1, 2])
def test_resume_across_layouts(results: Any, nproc: int) -> None:
    found = results(nproc)
    across = [name.split()[1:] for name in found if name.startswith("resume ") and len(set(name.split()[1:])) == 2]
    assert len(across) == 7
    for source, target in across:
        curve = torch.tensor(found[f"resume {source} {target}"]["curve"])
        expected = torch.tensor(found[f"train {source}"]["curve"][2:])
        torch.testing.assert_close(curve, expected, rtol=1e-3 if "bf16" in target else 1e-5, atol=0)
