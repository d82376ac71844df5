"""torch.compile changes nothing that is learned, and compiles once a kind of block, mode and sequence length."""

import functools
from typing import Any

import pytest

from pretrain.compile import CACHE_FOLDER
from tests.dist.harness import run_cases

pytestmark = pytest.mark.slow
# (ranks, case) -> pieces of code compiled for the training steps of a sequence length. One for all layers alike; the
# second layer may be of another kind; and around what is not compiled a block falls into several.
PIECES = {
    (1, "dense"): 1,
    (1, "recompute-full"): 2,  # of every second block
    (1, "recompute-selective"): 1,
    (1, "documents"): 1,
    (1, "documents-bf16"): 1,
    (1, "recompute-selective-bf16"): 1,
    (1, "moe-bf16"): 2,  # the second layer alone has experts
    (1, "moe-fp32"): 4,  # broken at the experts' products
    (2, "zero1-bf16"): 1,
    (2, "zero3"): 1,
    (2, "zero3-recompute"): 1,
    (2, "tensor"): 1,
    (2, "sequence"): 1,
    (2, "expert"): 4,  # broken where tokens travel to their experts
}
QUICK = {(1, "recompute-selective-bf16"), (1, "documents-bf16"), (1, "moe-bf16"), (2, "zero3-recompute")}
EACH = [pytest.param(*key, marks=() if key in QUICK else pytest.mark.long) for key in PIECES]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Results of the cases that this session selected, on one rank and on two, each run once. Nothing is compiled yet
    when they begin."""
    cache = tmp_path_factory.mktemp("compiled")
    chosen: dict[int, set[str]] = {1: set(), 2: set()}
    for item in request.session.items:
        if item.path == request.path:
            params = item.callspec.params  # type: ignore[attr-defined]
            chosen[params["nproc"]].add(params["case"])

    @functools.cache
    def on(nproc: int) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(CACHE_FOLDER, str(cache))
            patch.setenv("COMPILE_CASES", " ".join(sorted(chosen[nproc])))
            return run_cases("tests.dist.compile_cases", nproc, tmp_path_factory.mktemp(f"ranks{nproc}"))

    return on


@pytest.mark.parametrize(("nproc", "case"), EACH)
def test_it_compiles_once(results: Any, nproc: int, case: str) -> None:
    """Not again for another step, micro-batch or layer, nor after validation, nor back at a length that was there."""
    found, pieces = results(nproc)[case], PIECES[nproc, case]
    compiled = dict(found["compiled"])
    assert 0 < compiled.pop("validation") <= pieces
    assert compiled == {
        "first step": pieces,
        "steps": 0,
        "validation again": 0,
        "step after validation": 0,
        "shorter": pieces,
        "length as before": 0,
    }
    assert found["skipped"] == 0
    whole = case not in ("moe-fp32", "expert")
    assert all("torch.compiler.disable" in reason for reason in found["breaks"])
    assert whole == (not found["breaks"])


@pytest.mark.parametrize(("nproc", "case"), EACH)
def test_it_learns_the_same(results: Any, nproc: int, case: str) -> None:
    """fp32: 1e-5. bf16: what is fused is rounded less often, so 1e-3 on the loss, 1e-2 on the norm; Adam's first steps
    are the gradient's sign, which rounding turns where it is near 0: an element may go the other way, 7 times 1e-3."""
    found, bf16 = results(nproc)[case], "bf16" in case or case == "expert"
    for ours, plain in zip(*found["curve"], strict=True):
        assert ours[0] == pytest.approx(plain[0], rel=1e-3 if bf16 else 1e-5)
        assert ours[1] == pytest.approx(plain[1], rel=1e-2 if bf16 else 1e-5)
    assert found["validation"][0] == pytest.approx(found["validation"][1], rel=1e-3 if bf16 else 1e-5)
    assert found["masters"] <= (1.4e-2 if bf16 else 1e-5)
    ours, plain = found["load"]
    assert ours == plain or bf16
    assert [[sum(layer) for layer in step] for step in ours] == [[sum(layer) for layer in step] for step in plain]
