"""Expert parallelism around a pure decoder: tokens travel to the ranks that hold their experts, and back.

Every rank of the expert group has tokens of its own and E / expert whole experts of each layer; the tokens of all reach
the experts of all by an all-to-all of uneven sizes (GShard, Lepikhin et al. 2020, arXiv 2006.16668, section 3.2), and
nothing is dropped. The sizes are read by the host: one read a layer with experts.

N tokens, K experts a token takes, M = N K token-expert pairs sorted by expert, E experts, R ranks, D model width.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.decoder import Decoder
from model.moe import MoE
from model.token_rows import SortedRows, WeightedSum, sorted_by_expert
from pretrain.parallel_dims import ParallelDims


def apply_expert_parallelism(decoder: Decoder, dims: ParallelDims) -> None:
    """Make each layer's experts, of which the parameters are this rank's, serve the tokens of the expert group."""
    group = dims.groups["expert"]
    assert group is not None
    for layer in decoder.modules():
        if isinstance(layer, MoE):
            local = layer.experts.forward
            layer.experts.forward = functools.partial(_dispatched, local, group)  # type: ignore[method-assign]


def sum_load_over_sequences(decoder: Decoder, dims: ParallelDims) -> None:
    """Make the balance loss per sequence count the tokens of whole sequences, where ranks split them."""
    group = dims.groups["sample"]

    def summed(counts: Tensor) -> Tensor:
        counts = counts.clone()
        dist.all_reduce(counts, group=group)
        return counts

    for layer in decoder.modules():
        if isinstance(layer, MoE):
            layer.sum_over_sequence = summed


@torch.compiler.disable  # its sizes are other ones each time, and each would be compiled for itself
def _dispatched(
    local: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    group: dist.ProcessGroup,
    x_ND: Tensor,
    experts_NK: Tensor,
    weights_NK: Tensor,
    counts_E: Tensor,
) -> Tensor:
    """`Experts.forward` over a group: experts and counts are of those of all ranks.

    Weights stay at home, so that a token's sum is rounded once, as on one rank.
    """
    ranks = dist.get_world_size(group)
    received_RE = torch.empty_like(counts_E)  # from each rank, for each expert here
    dist.all_to_all_single(received_RE, counts_E.contiguous(), group=group)
    received_RE = received_RE.view(ranks, -1)
    sent = counts_E.view(ranks, -1).sum(1)
    sent_sizes, received_sizes = torch.stack([sent, received_RE.sum(1)]).tolist()

    order_M, place_M = sorted_by_expert(experts_NK)
    x_MD = SortedRows.apply(x_ND, order_M, place_M, experts_NK.size(1))
    arrived_MD = _Travel.apply(x_MD, sent_sizes, received_sizes, group)
    # They arrive by rank, and within a rank by expert.
    expert_R = torch.arange(received_RE.size(1), device=x_ND.device).repeat(ranks)
    expert_M1 = expert_R.repeat_interleave(received_RE.flatten(), output_size=len(arrived_MD))[:, None]
    ones_M1 = torch.ones_like(expert_M1, dtype=torch.float32)
    y_MD = local(arrived_MD, expert_M1, ones_M1, received_RE.sum(0))
    y_MD = _Travel.apply(y_MD, received_sizes, sent_sizes, group)
    return WeightedSum.apply(y_MD, order_M, place_M, weights_NK)


class _Travel(torch.autograd.Function):
    """Rows go to the ranks of the group, `sent_sizes[r]` of them in a row to rank r; gradients go the way back."""

    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, sent_sizes: list[int], received_sizes: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.back = received_sizes, sent_sizes, group
        return _exchanged(x_MD, sent_sizes, received_sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad_MD, *ctx.back), None, None, None


def _exchanged(x_MD: Tensor, sent_sizes: list[int], received_sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    received = x_MD.new_empty(sum(received_sizes), *x_MD.shape[1:])
    dist.all_to_all_single(received, x_MD.contiguous(), received_sizes, sent_sizes, group)
    return received
