"""RMSNorm in pieces against torch's, and its gradient against finite differences."""

import pytest
import torch
from torch import Tensor, nn

from model import norm
from model.norm import RMSNorm, rms_norm, rms_norm_in_pieces

ROWS, D, EPS = 50, 24, 1e-5


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 7 rows, the last one of fewer."""
    monkeypatch.setattr(norm, "PIECE_ELEMENTS", 7 * D + 3)


def results(function: norm.Norm, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """The result, and the gradients by x and by the weight."""
    y = function(x, weight, EPS)
    return [y, *torch.autograd.grad(y, (x, weight), grad)]


def inputs(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(*shape, D, generator=generator) * 3).to(dtype).requires_grad_()
    weight = torch.rand(D, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.randn(*shape, D, generator=generator).to(dtype)


@pytest.mark.parametrize("shape", [(ROWS,), (2, 25), (2, 5, 5), (1,), (0,)])
def test_fp32_equals_torch(shape: tuple[int, ...]) -> None:
    given = inputs(torch.float32, *shape)
    for ours, theirs in zip(results(rms_norm_in_pieces, *given), results(rms_norm, *given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_where_torch_rounds(dtype: torch.dtype) -> None:
    """Once, at the end: single elements may round the other way, by one unit in the last place."""
    given = inputs(dtype, ROWS)
    for ours, theirs in zip(results(rms_norm_in_pieces, *given), results(rms_norm, *given), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert (ours != theirs).float().mean() < 0.01


def test_rows_that_are_not_neighbours() -> None:
    x, weight, grad = inputs(torch.float32, 5, 10)
    apart = x.detach().transpose(0, 1).requires_grad_()
    ours, theirs = results(rms_norm_in_pieces, apart, weight, grad.transpose(0, 1)), results(rms_norm, x, weight, grad)
    torch.testing.assert_close(ours[0].transpose(0, 1), theirs[0])
    torch.testing.assert_close(ours[1].transpose(0, 1), theirs[1])


def test_gradient_is_the_derivative() -> None:
    x, weight, _ = inputs(torch.float64, 9)
    torch.autograd.gradcheck(lambda x, weight: rms_norm_in_pieces(x, weight, EPS), (x, weight))


def test_what_it_keeps_is_its_input_and_a_number_a_row() -> None:
    x, weight, _ = inputs(torch.bfloat16, ROWS)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rms_norm_in_pieces(x, weight, EPS)
    sizes = [tensor.nbytes for tensor in kept if tensor.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert sizes == [4 * ROWS]


def test_a_value_that_is_not_a_number_stays_one() -> None:
    x, weight, grad = inputs(torch.float32, ROWS)
    with torch.no_grad():
        x[3, 5] = torch.nan
    y, grad_x, _ = results(rms_norm_in_pieces, x, weight, grad)
    assert y[3].isnan().all()
    assert y.isnan().any(dim=1).sum() == 1
    assert grad_x[3].isnan().all()


def test_compiled_it_is_torchs() -> None:
    x, weight, _ = inputs(torch.float32, ROWS)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compile(rms_norm_in_pieces, backend=backend, fullgraph=True)(x, weight, EPS)
    assert "rms_norm" in graphs[0].code
    assert "_RMSNorm" not in graphs[0].code


def test_module_is_one_at_start_and_takes_either_function() -> None:
    module, x = RMSNorm(D, EPS), torch.randn(3, D)
    torch.testing.assert_close(module(x), nn.RMSNorm(D, EPS)(x))
    module.function = rms_norm_in_pieces
    torch.testing.assert_close(module(x), nn.RMSNorm(D, EPS)(x))
