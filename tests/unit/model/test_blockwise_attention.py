"""Blockwise attention is attention: against torch's, forward and backward, with and without documents."""

import platform

import pytest
import torch
from torch import Tensor

from model import blockwise_attention as blockwise
from model.attention import CausalAttention, causal_document_mask
from model.blockwise_attention import BlockwiseAttention, blockwise_attention, document_spans

TILED_DTYPES = blockwise.TILED_DTYPES
SHAPES = [(2, 300, 4, 2, 16), (3, 128, 4, 4, 8), (1, 5, 6, 1, 8), (2, 129, 2, 2, 32), (4, 1, 2, 1, 8)]  # B, T, H, K, h


@pytest.fixture(autouse=True)
def no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels on every machine that tests this."""
    monkeypatch.setattr(blockwise, "TILED_DTYPES", frozenset())


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and a gradient of what comes out."""
    B, T, H, K, h = shape
    generator = torch.Generator().manual_seed(T)
    sizes = ((B, T, H, h), (B, T, K, h), (B, T, K, h), (B, T, H, h))
    q, k, v, grad = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def document_ids(B: int, T: int) -> Tensor:
    """Documents of some tens of tokens, and in the last row of T."""
    ids = (torch.rand(B, T, generator=torch.Generator().manual_seed(B)) < 0.03).cumsum(1)
    ids[-1] = 7
    return ids


def with_gradients(out: Tensor, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    return [out, *torch.autograd.grad(out, (q, k, v), grad)]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
def test_it_is_torchs_attention(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that the batch is taken in several parts, and of the widest the heads.
    monkeypatch.setattr(blockwise, "SCORE_ELEMENTS", 4 * 128 * 300)
    monkeypatch.setattr(blockwise, "MOST_SCORE_ELEMENTS", 3 * 128 * 300)
    ids = document_ids(*shape[:2])
    q, k, v, grad = inputs(shape, dtype)
    found = with_gradients(blockwise_attention(q, k, v, document_spans(ids) if documents else None), q, k, v, grad)
    exact = torch.promote_types(dtype, torch.float32)
    q, k, v, grad = (x.detach().to(exact).requires_grad_() for x in (q, k, v, grad))
    mask = causal_document_mask(ids) if documents else None
    expected = with_gradients(CausalAttention()(q, k, v, mask), q, k, v, grad)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        # A lone token's weight is 1 whatever q and k are: their gradients are noise, or nothing.
        size = grad.norm() if shape[1] == 1 else theirs.norm()
        assert (ours - theirs).norm() <= tolerance * size


def test_in_16_bits_it_is_as_accurate_as_torchs() -> None:
    """Both round probabilities, ours the scores before too: within twice of each other, against fp64."""
    shape = (2, 384, 4, 2, 64)
    exact_inputs = inputs(shape, torch.float64)
    exact = with_gradients(CausalAttention()(*exact_inputs[:3]), *exact_inputs)
    q, k, v, grad = inputs(shape, torch.bfloat16)
    ours = with_gradients(BlockwiseAttention()(q, k, v), q, k, v, grad)
    theirs = with_gradients(CausalAttention()(q, k, v), q, k, v, grad)
    for one, other, true in zip(ours, theirs, exact, strict=True):
        assert (one - true).norm() <= 2 * (other - true).norm()


def test_what_other_documents_hold_is_never_looked_at() -> None:
    """Not even by a block's softmax: what cannot be seen may be anything."""
    q, k, v, _ = (x.detach() for x in inputs((1, 512, 2, 2, 8), torch.bfloat16))
    ids = torch.tensor([0] * 256 + [1] * 256)[None]
    spans = document_spans(ids)
    before = blockwise_attention(q, k, v, spans)
    k[:, :256] = v[:, :256] = torch.nan
    assert torch.equal(blockwise_attention(q, k, v, spans)[:, 256:], before[:, 256:])


def test_spans_say_what_the_dense_mask_says() -> None:
    ids = document_ids(3, 300)
    spans = document_spans(ids)
    assert torch.equal(spans.dense(), causal_document_mask(ids))
    assert spans.least == [row[:: blockwise.block_queries(300)].tolist() for row in spans.first]


def test_fp32_and_what_continues_a_cache_are_left_to_torch() -> None:
    q, k, v, _ = inputs((2, 40, 4, 2, 8), torch.float32)
    mask = document_spans(document_ids(2, 40))
    assert torch.equal(BlockwiseAttention()(q, k, v, mask), CausalAttention()(q, k, v, mask.dense()))
    q, k, v = (x.detach().bfloat16() for x in (q, k, v))
    assert torch.equal(BlockwiseAttention()(q[:, -1:], k, v), CausalAttention()(q[:, -1:], k, v))


def test_where_tiles_are_multiplied_torch_computes_forward_and_long_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "TILED_DTYPES", frozenset({torch.bfloat16}))
    monkeypatch.setattr(blockwise, "MOST_TILED_QUERIES", 600)
    for T, backward in ((600, False), (601, True)):
        q, k, v, grad = inputs((2, T, 4, 2, 64), torch.bfloat16)
        ours = with_gradients(BlockwiseAttention()(q, k, v), q, k, v, grad)
        theirs = with_gradients(CausalAttention()(q, k, v), q, k, v, grad)
        assert torch.equal(ours[0], theirs[0])
        assert all(torch.equal(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True)) == backward
        assert all((a - b).norm() <= 2e-2 * b.norm() for a, b in zip(ours, theirs, strict=True))
    spans = document_spans(document_ids(2, T))
    assert torch.equal(BlockwiseAttention()(q, k, v, spans), blockwise_attention(q, k, v, spans))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="tiles are Intel's")
def test_tiles_are_those_that_torch_sees() -> None:
    assert (torch.bfloat16 in TILED_DTYPES) == torch.cpu._is_amx_tile_supported()
    assert (torch.float16 in TILED_DTYPES) == torch.cpu._is_amx_fp16_supported()


def test_only_what_it_was_given_is_kept_for_backward() -> None:
    q, k, v, _ = inputs((2, 256, 4, 2, 16), torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        BlockwiseAttention()(q, k, v)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in (q, k, v)}
