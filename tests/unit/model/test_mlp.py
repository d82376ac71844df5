"""SwiGLU with its own backward against autograd's."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.mlp import MLP, gated


def plain(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_autograd_bit_for_bit(dtype: torch.dtype) -> None:
    gate, up, grad = torch.randn(3, 5, 7, 16).mul(4).to(dtype)
    gate, up = gate.requires_grad_(), up.requires_grad_()
    ours, theirs = gated(gate, up), plain(gate, up)
    assert torch.equal(ours, theirs)
    pairs = (torch.autograd.grad(result, (gate, up), grad) for result in (ours, theirs))
    for own, expected in zip(*pairs, strict=True):
        assert torch.equal(own, expected)


def test_gradient_is_the_derivative() -> None:
    gate, up = torch.randn(2, 4, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(gated, (gate.requires_grad_(), up.requires_grad_()))


def test_three_tensors_of_the_inner_width_are_kept() -> None:
    """gate and up, and their product, which the last projection takes."""
    mlp, x = MLP(8, 64), torch.randn(10, 8, requires_grad=True)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp(x)
    assert sum(tensor.shape == (10, 64) for tensor in kept.values()) == 3
