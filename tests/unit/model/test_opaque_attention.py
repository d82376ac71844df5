"""The operator that torch.compile sees gives the bits of the function that it stands for, forward and backward."""

import pytest
import torch
from torch import Tensor

from model.blockwise_attention import DocumentSpans, blockwise_attention, document_spans
from model.opaque_attention import OPERATOR, OpaqueBlockwiseAttention


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """q, k and v of 2 sequences of 300 tokens, with 4 query heads for 2 of keys and values."""
    random = torch.Generator().manual_seed(0)
    shapes = [(2, 300, heads, 16) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in shapes]


def spans(documents: bool) -> DocumentSpans | None:
    ids_BT = torch.stack([torch.arange(300) // 70, torch.arange(300) // 299])
    return document_spans(ids_BT) if documents else None


@pytest.mark.parametrize("documents", [False, True])
def test_it_is_the_same_to_the_bit(documents: bool) -> None:
    results = []
    for function in (OpaqueBlockwiseAttention(), blockwise_attention):
        q, k, v = inputs(torch.bfloat16)
        out = function(q, k, v, spans(documents))
        out.float().square().sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
    for ours, plain in zip(*results, strict=True):
        assert ours is not None
        assert plain is not None
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("documents", [False, True])
def test_what_the_compiler_is_told_of_it_is_true(documents: bool) -> None:
    """Shapes, strides and dtypes without values, autograd's registration, and that it changes no argument."""
    found = spans(documents)
    first = None if found is None else found.first
    torch.library.opcheck(OPERATOR, (*inputs(torch.bfloat16), first), test_utils=_CHECKS)


_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
