"""Causal attention for processors: exact, in blocks of queries, as batched matrix products.

B batch, T tokens, H query heads, K key and value heads, g = H / K query heads of each, h head size, n blocks of T; b
rows of the batch, t queries and S keys of a block; G products at once, one for each row and key head, of R = g t rows.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.attention import CausalAttention

# Scores that are worked on at a time. They pass several times through the cache: few enough to stay there, enough to
# keep all threads at work.
SCORE_ELEMENTS = 1 << 21
# One row of the batch may have more than that, but not more than these at a time: its heads are taken in parts.
MOST_SCORE_ELEMENTS = 1 << 24
# What this processor multiplies in tiles (Intel's AMX), for which torch's kernel packs its operands.
TILED_DTYPES = frozenset(
    dtype
    for dtype, feature in ((torch.bfloat16, "amx_bf16"), (torch.float16, "amx_fp16"))
    if torch.cpu.get_capabilities().get(feature, False)
)
# Up to so many queries, backward is quicker here than in torch's kernel for tiles.
MOST_TILED_QUERIES = 1024


def block_queries(T: int) -> int:
    """Queries of a block: small ones compute less that is then hidden, large ones are quicker where keys are many, or
    products quick."""
    return 256 if TILED_DTYPES else min(max(128, T // 16), 256)


class DocumentSpans(NamedTuple):
    """Where the documents begin that the tokens of a batch are in, for documents that lie one after another in a row.

    first: the first token of each token's document, (B, T) int64. least: the least of them in each block, (B, n).
    """

    first: Tensor
    least: list[list[int]]

    def dense(self) -> Tensor:
        """Which keys each token sees, (B, 1, T, T) bool."""
        key_T = torch.arange(self.first.size(1), device=self.first.device)
        return ((key_T >= self.first[..., None]) & (key_T <= key_T[:, None]))[:, None]


def document_spans(document_ids_BT: Tensor) -> DocumentSpans:
    """The spans of documents given by an id a token. Read by the host, which for a processor is no wait."""
    place_BT = torch.arange(document_ids_BT.size(1), device=document_ids_BT.device).expand_as(document_ids_BT)
    changes_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    changes_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    first_BT = (place_BT * changes_BT).cummax(dim=1).values
    return spans_of(first_BT)


def spans_of(first_BT: Tensor) -> DocumentSpans:
    """The spans, from the first token of each token's document."""
    starts_Bn = first_BT[:, :: block_queries(first_BT.size(1))]  # firsts never fall along a row
    return DocumentSpans(first_BT, starts_Bn.tolist())


class BlockwiseAttention(CausalAttention):
    """softmax(q k^T / sqrt(h)) v, as `CausalAttention`, in 16 bits; what documents hide is not computed.

    A block of queries meets all its keys at once, so its softmax is a plain one: nothing is rescaled, and backward
    computes it again from q and k, which with v are all that is kept. What an operation gives is in the inputs' dtype,
    what it computes with, and the sums of gradients over blocks, in fp32. Compared with torch's kernel, which takes
    small tiles through both products, a processor's libraries reach their speed on these larger ones, above all in
    backward. In fp32, whose products are slower than what is saved, torch's is as fast or faster, and taken. Without
    documents it is also taken where the processor multiplies tiles: forward, and above MOST_TILED_QUERIES backward.
    """

    def forward(
        self, q_BTHh: Tensor, k_BSKh: Tensor, v_BSKh: Tensor, mask: Tensor | DocumentSpans | None = None
    ) -> Tensor:
        """mask: of `document_spans`; with a cache's dense one, as `CausalAttention`."""
        continues = q_BTHh.size(1) != k_BSKh.size(1)
        long = mask is None and q_BTHh.size(1) > MOST_TILED_QUERIES and q_BTHh.dtype in TILED_DTYPES
        if q_BTHh.dtype == torch.float32 or continues or long or isinstance(mask, Tensor):
            return super().forward(q_BTHh, k_BSKh, v_BSKh, mask.dense() if isinstance(mask, DocumentSpans) else mask)
        return self.blockwise(q_BTHh, k_BSKh, v_BSKh, mask)

    def blockwise(self, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor, spans: DocumentSpans | None) -> Tensor:
        """See `blockwise_attention`."""
        return blockwise_attention(q_BTHh, k_BTKh, v_BTKh, spans)


def blockwise_attention(q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor, spans: DocumentSpans | None = None) -> Tensor:
    """q (B, T, H, h), k and v (B, T, K, h) -> (B, T, H, h), causal, within documents if there are `spans`."""
    return _Blockwise.apply(q_BTHh, k_BTKh, v_BTKh, spans)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor, spans: DocumentSpans | None) -> Tensor:
        ctx.save_for_backward(q_BTHh, k_BTKh, v_BTKh)
        ctx.spans = spans
        return attended(q_BTHh, k_BTKh, v_BTKh, spans)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHh: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BTHh, k_BTKh, v_BTKh = ctx.saved_tensors
        return *gradients(grad_BTHh, q_BTHh, k_BTKh, v_BTKh, ctx.spans), None


def attended(q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor, spans: DocumentSpans | None) -> Tensor:
    """What `blockwise_attention` gives, unknown to autograd."""
    if spans is None and q_BTHh.dtype in TILED_DTYPES:
        return CausalAttention()(q_BTHh, k_BTKh, v_BTKh).contiguous()
    g = q_BTHh.size(2) // k_BTKh.size(2)
    out_BTHh = torch.empty_like(q_BTHh, memory_format=torch.contiguous_format)
    for rows, keys, queries in _parts(q_BTHh, g):
        k_GTh, v_GTh = _matrices(k_BTKh[rows, :, keys]), _matrices(v_BTKh[rows, :, keys])
        for block, seen in _blocks(q_BTHh.size(1), rows, spans):
            p_GRS = _probabilities(_matrices(q_BTHh[rows, block, queries], g), k_GTh[:, seen], rows, block, spans)
            _write(torch.bmm(p_GRS, v_GTh[:, seen]), out_BTHh[rows, block, queries], g)
    return out_BTHh


def gradients(
    grad_BTHh: Tensor, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor, spans: DocumentSpans | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v, given that of the result."""
    g, scale = q_BTHh.size(2) // k_BTKh.size(2), q_BTHh.size(-1) ** -0.5
    grad_q_BTHh, grad_k_BTKh, grad_v_BTKh = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BTHh, k_BTKh, v_BTKh)
    )
    for rows, keys, queries in _parts(q_BTHh, g):
        k_GTh, v_GTh = _matrices(k_BTKh[rows, :, keys]), _matrices(v_BTKh[rows, :, keys])
        accurate = torch.promote_types(k_GTh.dtype, torch.float32)
        grad_k_GTh, grad_v_GTh = torch.zeros((2, *k_GTh.shape), dtype=accurate, device=k_GTh.device)
        for block, seen in _blocks(q_BTHh.size(1), rows, spans):
            q_GRh, grad_GRh = _matrices(q_BTHh[rows, block, queries], g), _matrices(grad_BTHh[rows, block, queries], g)
            p_GRS = _probabilities(q_GRh, k_GTh[:, seen], rows, block, spans)
            grad_v_GTh[:, seen] += torch.bmm(p_GRS.mT, grad_GRh)
            grad_p_GRS = torch.bmm(grad_GRh, v_GTh[:, seen].mT)
            # What torch.softmax's own backward calls.
            grad_s_GRS = torch.ops.aten._softmax_backward_data(grad_p_GRS, p_GRS, -1, p_GRS.dtype)
            _write(_scaled_bmm(grad_s_GRS, k_GTh[:, seen], scale), grad_q_BTHh[rows, block, queries], g)
            grad_k_GTh[:, seen] += _scaled_bmm(grad_s_GRS.mT, q_GRh, scale)
        _write(grad_k_GTh, grad_k_BTKh[rows, :, keys])
        _write(grad_v_GTh, grad_v_BTKh[rows, :, keys])
    return grad_q_BTHh, grad_k_BTKh, grad_v_BTKh


def _parts(q_BTHh: Tensor, g: int) -> Iterator[tuple[slice, slice, slice]]:
    """Rows of the batch, key heads, and their query heads, of which a block's scores are so many as the constants say,
    or those of one key head."""
    B, T, H, _ = q_BTHh.shape
    of_a_head = g * min(block_queries(T), T) * T
    row_step = max(1, SCORE_ELEMENTS // (H // g * of_a_head))
    head_step = max(1, MOST_SCORE_ELEMENTS // of_a_head)
    for row, head in itertools.product(range(0, B, row_step), range(0, H // g, head_step)):
        keys = slice(head, min(head + head_step, H // g))
        yield slice(row, min(row + row_step, B)), keys, slice(g * keys.start, g * keys.stop)


def _blocks(T: int, rows: slice, spans: DocumentSpans | None) -> Iterator[tuple[slice, slice]]:
    """Each block of queries, and the keys that some of them see."""
    step = block_queries(T)
    for index, start in enumerate(range(0, T, step)):
        stop = min(start + step, T)
        first = 0 if spans is None else min(row[index] for row in spans.least[rows])
        yield slice(start, stop), slice(first, stop)


def _probabilities(q_GRh: Tensor, k_GSh: Tensor, rows: slice, block: slice, spans: DocumentSpans | None) -> Tensor:
    """What each query of a block gives each of the keys, which end with the block, (G, R, S)."""
    scores_GRS = _scaled_bmm(q_GRh, k_GSh.mT, q_GRh.size(-1) ** -0.5)
    t, S, device = block.stop - block.start, k_GSh.size(1), q_GRh.device
    # Added, since a sum is quicker than to choose.
    later_tt = torch.full((t, t), -torch.inf, dtype=scores_GRS.dtype, device=device).triu(1)
    scores_GRS.view(-1, t, S)[..., S - t :].add_(later_tt)
    if spans is not None:
        first_bt = spans.first[rows, block]
        earlier_btS = torch.arange(block.stop - S, block.stop, device=device) < first_bt[..., None]
        scores_GRS.view(len(first_bt), -1, t, S).masked_fill_(earlier_btS[:, None], -torch.inf)
    return scores_GRS.softmax(-1)


def _scaled_bmm(a_Grs: Tensor, b_Gst: Tensor, scale: float) -> Tensor:
    """scale * a @ b, scaled before it is rounded."""
    return torch.baddbmm(a_Grs.new_empty(()), a_Grs, b_Gst, beta=0, alpha=scale)


def _by_key_head(x_btHh: Tensor, g: int) -> Tensor:
    """(b, t, H, h) -> (b, H / g, g, t, h), a view."""
    return x_btHh.unflatten(2, (-1, g)).permute(0, 2, 3, 1, 4)


def _matrices(x_btHh: Tensor, g: int = 1) -> Tensor:
    """(b, t, H, h) -> (b H / g, g t, h): one for each key head, of all query heads that share it."""
    return _by_key_head(x_btHh, g).flatten(0, 1).flatten(1, 2)


def _write(x_GRh: Tensor, into_btHh: Tensor, g: int = 1) -> None:
    """The inverse of `_matrices`."""
    target_bKgth = _by_key_head(into_btHh, g)
    target_bKgth.copy_(x_GRh.view(target_bKgth.shape))
