"""Causal attention within documents that never makes a (T, T) mask: FlexAttention over blocks of tokens.

FlexAttention (Dong et al. 2024, arXiv 2412.05496) compiles one kernel for forward and one for backward, which pass over
a block of scores where no query sees a key, compute one where each sees all without a mask, and in the rest ask
`mask_mod` score by score. Which block is which follows here from the documents that a block of tokens begins and ends
with, in (T / BLOCK)^2 numbers. It was preferred to attention over sequences of given lengths
(`torch.nn.attention.varlen`): that wants the number of documents on the host, a wait in every step, and 16 bits.

For GPUs, on which it has not been timed. A CPU computes forward alone, and both only uncompiled, as the reference that
the tests use.

B batch, T tokens, H query heads, K key and value heads, h head size, n blocks of tokens.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model.attention import CausalAttention

BLOCK_TOKENS = 128


class FlexKernel(Protocol):
    """`flex_attention`, compiled or not."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, block_mask: BlockMask, enable_gqa: bool) -> Any:
        """q (B, H, T, h), k and v (B, K, T, h) -> (B, H, T, h)."""


def compiled_kernel(most_versions: int) -> FlexKernel:
    """One for all layers: it is compiled once for each shape, so twice for each length of sequence: with gradients, and
    without.

    most_versions: above so many torch would compute uncompiled, and make the scores of all pairs.
    """
    return torch.compile(flex_attention, dynamic=False, recompile_limit=most_versions)  # type: ignore[call-overload]


class FlexAttention(CausalAttention):
    """softmax(q k^T / sqrt(h)) v within documents, as `CausalAttention` under their dense mask."""

    def __init__(self, kernel: FlexKernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, q_BTHh: Tensor, k_BSKh: Tensor, v_BSKh: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        """mask: of `document_blocks`; without one, or with a cache's dense one, as `CausalAttention`."""
        if not isinstance(mask, BlockMask):
            return super().forward(q_BTHh, k_BSKh, v_BSKh, mask)
        q_BHTh, k_BKTh, v_BKTh = (x.transpose(1, 2) for x in (q_BTHh, k_BSKh, v_BSKh))
        shared = q_BHTh.size(1) != k_BKTh.size(1)
        return self.kernel(q_BHTh, k_BKTh, v_BKTh, block_mask=mask, enable_gqa=shared).transpose(1, 2)


def document_blocks(document_ids_BT: Tensor) -> BlockMask:
    """What `FlexAttention` needs to know of the documents; for any ids, in whatever order they come.

    Nothing is read by the host, and every shape follows from (B, T). A block counts as seen if the ranges of ids in its
    queries and in its keys meet, which is exact where ids rise along a row, and never too little.
    """
    T = document_ids_BT.size(1)
    n = -(-T // BLOCK_TOKENS)
    # The last document goes on to the end of the last block, whose range of ids stays what it is.
    filled_BT = torch.cat([document_ids_BT, document_ids_BT[:, -1:].expand(-1, n * BLOCK_TOKENS - T)], dim=1)
    low_Bn, high_Bn = filled_BT.unflatten(1, (n, BLOCK_TOKENS)).aminmax(dim=2)
    block_n = torch.arange(n, device=document_ids_BT.device)
    before_nn = block_n[:, None] > block_n
    meet_Bnn = (low_Bn[:, :, None] <= high_Bn[:, None]) & (low_Bn[:, None] <= high_Bn[:, :, None])
    # Of one document both, and the same: the least of either is the most of the other.
    one_Bnn = (low_Bn[:, :, None] == high_Bn[:, None]) & (low_Bn[:, None] == high_Bn[:, :, None])
    # A block of queries that ends past the sequence is left to `mask_mod`, as in torch's own `create_block_mask`.
    complete_n1 = (block_n[:, None] + 1) * BLOCK_TOKENS <= T
    full_Bnn = before_nn & one_Bnn & complete_n1
    partial_Bnn = (before_nn | (block_n[:, None] == block_n)) & meet_Bnn & ~full_Bnn

    def within_document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (document_ids_BT[b, q] == document_ids_BT[b, k])

    return BlockMask.from_kv_blocks(
        *_listed(partial_Bnn), *_listed(full_Bnn), BLOCK_TOKENS, within_document, seq_lengths=(T, T)
    )


def _listed(chosen_Bnn: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys are chosen for each block of queries, (B, 1, n), and which, (B, 1, n, n), these first."""
    order_Bnn = chosen_Bnn.int().argsort(dim=2, descending=True, stable=True)
    return chosen_Bnn.sum(dim=2, dtype=torch.int32)[:, None], order_Bnn.to(torch.int32)[:, None]
