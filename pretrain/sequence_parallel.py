"""Sequence parallelism around a pure decoder: each rank has a part of the sequence, and in attention some of the heads.

DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509, section 3): before attention an all-to-all turns (a part of
the tokens, every head) into (every token, a part of the heads), after it another turns back. Attention itself sees
whole sequences, so that causality and document masks are what they are on one rank.

B batch, T tokens, t = T / sequence, H query heads of this rank's tensor shard, K its key and value heads, h head size.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.decoder import Decoder
from pretrain.parallel_dims import ParallelDims


def apply_sequence_parallelism(decoder: Decoder, dims: ParallelDims) -> None:
    """Put the all-to-alls around attention's core. The decoder is then given the rank's part of tokens, targets and
    positions, and the document ids of whole sequences."""
    group = dims.groups["sequence"]
    assert group is not None
    ranks = dims.size("sequence")

    def split_heads(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        q_BtHh, k_BtKh, v_BtKh, *mask = inputs
        copies = key_value_copies(k_BtKh.size(2), ranks)
        k_BtKh, v_BtKh = (x.repeat_interleave(copies, dim=2) for x in (k_BtKh, v_BtKh))
        return *(_AllToAll.apply(x, 2, 1, group) for x in (q_BtHh, k_BtKh, v_BtKh)), *mask

    def split_tokens(_: Any, inputs: Any, out_BTHh: Tensor) -> Tensor:
        return _AllToAll.apply(out_BTHh, 1, 2, group)

    block: Any
    for block in decoder.layers:
        block.self_attn.core.register_forward_pre_hook(split_heads)
        block.self_attn.core.register_forward_hook(split_tokens)


def key_value_copies(kv_heads: int, ranks: int) -> int:
    """How often each key and value head must be there, so that an equal share goes to each rank together with the
    query heads that it serves, which divide over the ranks."""
    return ranks // math.gcd(kv_heads, ranks)


class _AllToAll(torch.autograd.Function):
    """Split one dimension over the ranks, and join another from theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: int, join: int, group: dist.ProcessGroup) -> Tensor:
        ctx.back = join, split, group
        return _exchanged(x, split, join, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad, *ctx.back), None, None, None


def _exchanged(x: Tensor, split: int, join: int, group: dist.ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    parts = x.unflatten(split, (ranks, -1)).movedim(split, 0).contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received.movedim(0, join).flatten(join, join + 1)
