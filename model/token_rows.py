"""Rows of tokens in the order of their experts, and back: gathered both ways, so that every sum has a fixed order.

N tokens, K experts a token takes, M = N K token-expert pairs, of which pair n K + k is the k-th of token n; E experts,
D model width, P slots.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Slots of an expert come in such multiples. A processor's library compiles a matrix product for each number of rows it
# meets (milliseconds each), and numbers of tokens hardly ever recur; a GPU wants multiples of 8 for aligned gradients.
SLOT_MULTIPLE = 64


class Slots(NamedTuple):
    """Where pairs lie sorted by expert, each expert's slots padded to a multiple of SLOT_MULTIPLE.

    pairs: (P,) int64, the pair in each slot. Padding repeats a pair of the same expert: it is as finite as that.
    real: (P,) bool, false where a slot pads. places: (M,) int64, each pair's slot.
    ends: (E,) int32, where each expert's slots end. From the last end on nothing is computed or to be read.
    """

    pairs: Tensor
    real: Tensor
    places: Tensor
    ends: Tensor


def sorted_by_expert(experts_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs sorted by expert, those of an expert in the order of tokens; and each pair's place among them, (M,)."""
    order_M = experts_NK.flatten().argsort(stable=True)
    return order_M, torch.empty_like(order_M).scatter_(0, order_M, _range_like(order_M))


def slots(experts_NK: Tensor, counts_E: Tensor) -> Slots:
    """counts_E: int64, how many pairs are each expert's. The host reads nothing: there are as many slots as the worst
    of counts would need."""
    M, E = experts_NK.numel(), len(counts_E)
    order_M, rank_M = sorted_by_expert(experts_NK)
    padded_E = (counts_E + (SLOT_MULTIPLE - 1)) // SLOT_MULTIPLE * SLOT_MULTIPLE
    ends_E, pair_ends_E = padded_E.cumsum(0), counts_E.cumsum(0)
    shift_E = (ends_E - padded_E) - (pair_ends_E - counts_E)  # from a pair's rank to its slot
    places_M = rank_M + shift_E[experts_NK.flatten()]

    slot_P = torch.arange(slot_count(M, E), device=experts_NK.device)
    expert_P = torch.bucketize(slot_P, ends_E, right=True).clamp_(max=E - 1)
    rank_P, pair_ends_P = slot_P - shift_E[expert_P], pair_ends_E[expert_P]
    pairs_P = order_M[torch.minimum(rank_P, pair_ends_P - 1)]
    return Slots(pairs_P, rank_P < pair_ends_P, places_M, ends_E.int())


def slot_count(pairs: int, experts: int) -> int:
    """The most slots that the pairs can take: at most so many experts have any, and each of them pads."""
    return pairs + min(pairs, experts) * (SLOT_MULTIPLE - 1)


def scaled(rows_PD: Tensor, weights_P: Tensor) -> Tensor:
    """Each row times its weight, rounded once."""
    return rows_PD.float().mul_(weights_P[:, None]).to(rows_PD.dtype)


def weighted_sum(rows_PD: Tensor, places_M: Tensor, weights_NK: Tensor) -> Tensor:
    """Sum over k of weights[n, k] rows[places[n K + k]]: (N, D), multiplied and added in fp32, rounded once."""
    places_NK = places_M.view_as(weights_NK)
    sum_ND = rows_PD.new_zeros((len(weights_NK), rows_PD.size(1)), dtype=torch.float32)
    for places_N, weights_N in zip(places_NK.unbind(1), weights_NK.unbind(1), strict=True):
        sum_ND.addcmul_(rows_PD.index_select(0, places_N).float(), weights_N[:, None])
    return sum_ND.to(rows_PD.dtype)


def row_products(a_PD: Tensor, b_PD: Tensor) -> Tensor:
    """Of each row of a with the same of b, added in fp32, (P,)."""
    return (a_PD * b_PD).sum(dim=1, dtype=torch.float32)


class SortedRows(torch.autograd.Function):
    """x (N, D) -> its rows for the sorted pairs, (M, D); order_M and place_M of `sorted_by_expert`.

    The gradient is gathered by the places, and the copies of a row are added in the order of k: an indexed addition
    would be atomic on a GPU, in an order that changes from run to run.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_M: Tensor, place_M: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(place_M)
        ctx.copies = copies
        return x_ND.index_select(0, order_M // copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None, None]:
        (place_M,) = ctx.saved_tensors
        ones_NK = torch.ones(len(place_M) // ctx.copies, ctx.copies, device=grad_MD.device)
        return weighted_sum(grad_MD, place_M, ones_NK), None, None, None


class WeightedSum(torch.autograd.Function):
    """`weighted_sum` of sorted rows (M, D) by the places and with the weights of their tokens."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, order_M: Tensor, place_M: Tensor, weights_NK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_MD, order_M, place_M, weights_NK)
        return weighted_sum(rows_MD, place_M, weights_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, Tensor]:
        rows_MD, order_M, place_M, weights_NK = ctx.saved_tensors
        grad_MD = grad_ND.index_select(0, order_M // weights_NK.size(1))
        grad_weights_NK = row_products(grad_MD, rows_MD)[place_M].view_as(weights_NK)
        return scaled(grad_MD, weights_NK.flatten()[order_M]), None, None, grad_weights_NK


def _range_like(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)
