"""Tensor parallelism around a pure decoder: what is communicated where the sharded matrices begin and end.

Megatron's scheme with sequence-parallel regions (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2): the
residual stream, norms and everything else between the matrices hold T / tensor tokens a rank; attention and MLP gather
the tokens on their way in and reduce-scatter the sums on their way out, which together is the traffic of one
all-reduce. The modules themselves are untouched: hooks communicate at their borders, and the weights are shards.

B batch, T tokens of the sequence this rank's group works on, t = T / tensor, D model width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from model.decoder import Decoder
from model.loss import VocabularyPart
from model.mlp import MLP
from pretrain.parallel_dims import ParallelDims


def apply_tensor_parallelism(decoder: Decoder, dims: ParallelDims) -> None:
    """Put the communication around a decoder whose parameters are this rank's shards (`pretrain/placement.py`)."""
    group = dims.groups["tensor"]
    assert group is not None
    _split_vocabulary(decoder, dims, group)
    block: Any
    for block in decoder.layers:
        insides = [(block.self_attn, block.self_attn.o_proj)]
        insides += [(mlp, mlp.down_proj) for mlp in block.modules() if isinstance(mlp, MLP)]  # shared experts, too
        for inside, last in insides:
            inside.register_forward_pre_hook(lambda _, inputs: (gather_sequence(inputs[0], group), *inputs[1:]))
            last.register_forward_hook(lambda _, inputs, output: scatter_sequence(output, group))
    decoder.lm_head.register_forward_pre_hook(lambda _, inputs: (gather_sequence(inputs[0], group), *inputs[1:]))


def _split_vocabulary(decoder: Decoder, dims: ParallelDims, group: dist.ProcessGroup) -> None:
    """Embedding: each rank looks up the tokens it has, the others are 0. Head: sums and maxima over all parts."""
    embedding = decoder.embed_tokens
    rows = embedding.num_embeddings // dims.layout.tensor
    start = dims.index("tensor") * rows

    def look_up(tokens_BT: Tensor) -> Tensor:
        row_BT = tokens_BT - start
        held_BT = (row_BT >= 0) & (row_BT < rows)
        found_BTD = functional.embedding(row_BT.where(held_BT, 0), embedding.weight)
        return scatter_sequence(found_BTD * held_BT[..., None], group)

    embedding.forward = look_up  # type: ignore[method-assign, assignment]

    def maximum(x: Tensor) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.MAX, group)
        return x

    def total(x: Tensor) -> Tensor:
        dist.all_reduce(x, group=group)
        return x

    decoder.lm_head.part = VocabularyPart(start, maximum, total)


def gather_sequence(x_BtD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, t, D) of each rank -> (B, T, D); the gradient of the whole is summed over ranks, each keeping its tokens."""
    return _GatherSequence.apply(x_BtD, group)


def scatter_sequence(x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of every rank's (B, T, D), of which each keeps its (B, t, D); the gradient is gathered."""
    return _ScatterSequence.apply(x_BTD, group)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BtD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x_BtD, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, None]:
        return _scattered(grad_BTD, ctx.group), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scattered(x_BTD, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BtD: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad_BtD, ctx.group), None


def _gathered(x_BtD: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks, (B, t, *rest) = dist.get_world_size(group), x_BtD.shape
    gathered = x_BtD.new_empty(ranks * B, t, *rest)
    dist.all_gather_single(gathered, x_BtD.contiguous(), group)
    return gathered.unflatten(0, (ranks, B)).transpose(0, 1).reshape(B, ranks * t, *rest)


def _scattered(x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks, (B, T, *rest) = dist.get_world_size(group), x_BTD.shape
    parts = x_BTD.unflatten(1, (ranks, T // ranks)).transpose(0, 1).flatten(0, 1).contiguous()
    scattered = x_BTD.new_empty(B, T // ranks, *rest)
    dist.reduce_scatter_single(scattered, parts, group=group)
    return scattered
