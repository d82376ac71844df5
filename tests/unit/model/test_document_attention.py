"""FlexAttention over blocks of tokens against the dense mask: which blocks, forward, backward, and compilations.

What runs on a GPU is torch's kernel; here its uncompiled reference runs, and in one test the kernel for processors.
"""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model.attention import CausalAttention, causal_document_mask
from model.decoder import Decoder
from model.document_attention import BLOCK_TOKENS, FlexAttention, compiled_kernel, document_blocks
from model.init import initialise
from tests.small_run import small_config


def document_ids(lengths: list[list[int]]) -> Tensor:
    """One row for each list of documents' lengths, numbered from 0."""
    return torch.tensor([[index for index, length in enumerate(row) for _ in range(length)] for row in lengths])


def seen(blocks: BlockMask, T: int) -> Tensor:
    """Which keys each query sees if blocks are passed over, computed whole, or masked as listed: (B, T, T) bool."""
    B, _, n = blocks.kv_num_blocks.shape
    b, q, k = torch.meshgrid(torch.arange(B), torch.arange(T), torch.arange(T), indexing="ij")
    result = torch.zeros(B, n, n, dtype=torch.int8)
    for kind, (counts, indices) in enumerate(
        [(blocks.kv_num_blocks, blocks.kv_indices), (blocks.full_kv_num_blocks, blocks.full_kv_indices)], start=1
    ):
        assert counts is not None
        assert indices is not None
        for row in range(B):
            for block in range(n):
                result[row, block, indices[row, 0, block, : counts[row, 0, block]].long()] += kind
    kind_BTT = result.repeat_interleave(BLOCK_TOKENS, 1).repeat_interleave(BLOCK_TOKENS, 2)[:, :T, :T]
    assert kind_BTT.max() <= 2, "a block is listed twice"
    return (kind_BTT == 2) | ((kind_BTT == 1) & blocks.mask_mod(b, torch.zeros_like(b), q, k))


def rows_of(T: int) -> st.SearchStrategy[list[int]]:
    """Ids of a row of T tokens: documents one after another, or any ids in any order."""
    cuts = st.lists(st.integers(0, T), max_size=5)
    anything = st.lists(st.integers(0, 3), min_size=T, max_size=T)
    return st.one_of(cuts.map(lambda starts: [sum(i >= start for start in starts) for i in range(T)]), anything)


@settings(max_examples=30)
@given(st.integers(1, 4 * BLOCK_TOKENS).flatmap(lambda T: st.lists(rows_of(T), min_size=1, max_size=2)))
def test_blocks_say_what_the_dense_mask_does(rows: list[list[int]]) -> None:
    ids_BT = torch.tensor(rows)
    assert torch.equal(seen(document_blocks(ids_BT), ids_BT.size(1)), causal_document_mask(ids_BT)[:, 0])


def test_blocks_are_passed_over_and_computed_whole() -> None:
    """One long document after a short one: nothing is masked score by score but at the edges."""
    blocks = document_blocks(document_ids([[BLOCK_TOKENS, 4 * BLOCK_TOKENS]]))
    assert blocks.kv_num_blocks.tolist() == [[[1, 1, 1, 1, 1]]]
    assert blocks.full_kv_num_blocks is not None
    assert blocks.full_kv_num_blocks.tolist() == [[[0, 0, 1, 2, 3]]]


def test_no_mask_of_all_pairs_is_made() -> None:
    """The largest tensor has a number for each pair of blocks, not of tokens."""
    blocks = document_blocks(torch.zeros(1, 32 * BLOCK_TOKENS, dtype=torch.long))
    assert max(t.numel() for t in blocks.as_tuple() if isinstance(t, Tensor)) == 32 * 32
    assert document_blocks(torch.zeros(2, 1000, dtype=torch.long, device="meta")).kv_indices.shape == (2, 1, 8, 8)


def attention_inputs(T: int, heads: int, kv_heads: int, requires_grad: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    return [
        torch.randn(2, T, count, 16, generator=generator).requires_grad_(requires_grad)
        for count in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize(("T", "heads", "kv_heads"), [(2 * BLOCK_TOKENS, 2, 2), (300, 4, 2)], ids=["plain", "gqa"])
def test_forward_and_backward_are_those_of_the_dense_mask(
    T: int, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch refuses backward on a processor, where it has no kernel for it; its reference computes it all the same.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    ids_BT = document_ids([[T], [100, 1, T - 101]])
    flex, dense = attention_inputs(T, heads, kv_heads, True), attention_inputs(T, heads, kv_heads, True)
    ours = FlexAttention(flex_attention)(*flex, document_blocks(ids_BT))
    theirs = CausalAttention()(*dense, causal_document_mask(ids_BT))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for out in (ours, theirs):
        (out * weights).sum().backward()
    for a, b in zip(flex, dense, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_kernel_passes_over_blocks_and_is_compiled_once_a_length() -> None:
    counter = CompileCounterWithBackend("inductor")
    core = FlexAttention(torch.compile(flex_attention, backend=counter, dynamic=False))
    with torch.no_grad():
        for T, lengths in [(300, [100, 200]), (300, [1, 7, 292]), (256, [256]), (300, [300])]:
            ids_BT, inputs = document_ids([lengths, [T]]), attention_inputs(T, 4, 2, False)
            out = core(*inputs, document_blocks(ids_BT))
            expected = CausalAttention()(*inputs, causal_document_mask(ids_BT))
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2


@pytest.mark.slow
def test_it_is_compiled_for_more_lengths_than_torch_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 8 torch goes on uncompiled, without a word."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    core, lengths = FlexAttention(compiled_kernel(64)), range(20, 29)
    with torch.no_grad():
        for T in lengths:
            core(*attention_inputs(T, 2, 2, False), document_blocks(document_ids([[T], [T]])))
    assert counter.frame_count == len(lengths)


def test_without_blocks_it_is_causal_attention() -> None:
    q, k, v = attention_inputs(40, 2, 2, False)
    core: Any = FlexAttention(flex_attention)
    assert torch.equal(core(q, k, v), CausalAttention()(q, k, v))
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril(3)
    assert torch.equal(core(q, k, v, mask), CausalAttention()(q, k, v, mask))


def test_a_decoder_with_blocks_has_the_losses_of_one_with_a_dense_mask() -> None:
    config = small_config("model.document_mask=true").model
    plain, blocked = Decoder(config), Decoder(config)
    for decoder in (plain, blocked):
        initialise(decoder, 0)
        for matrix in (parameter for parameter in decoder.parameters() if parameter.dim() == 2):
            matrix.data *= 5  # so that attention looks at something
    blocked.document_mask = document_blocks
    block: Any
    for block in blocked.layers:
        block.self_attn.core = FlexAttention(flex_attention)
    tokens = torch.randint(0, config.vocab_size, (2, 150), generator=torch.Generator().manual_seed(0))
    ids = document_ids([[70, 80], [1, 149]])
    with torch.no_grad():
        a, b = (decoder(tokens, tokens.roll(-1, 1), document_ids_BT=ids) for decoder in (plain, blocked))
        unmasked = plain(tokens, tokens.roll(-1, 1))
    torch.testing.assert_close(a.total, b.total, rtol=1e-6, atol=0)
    assert abs(a.total - unmasked.total) > 1e-4 * a.total
