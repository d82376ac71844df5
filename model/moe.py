"""Mixture of experts in place of an MLP, without a capacity: no token is dropped.

B batch, T sequence, D model width, E experts, F inner width of one, K experts a token takes, N = B T tokens,
M = N K token-expert pairs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from model.config import ModelConfig
from model.mlp import MLP
from model.router import Router, auxiliary_loss, count_pairs


class Experts(nn.Module):
    """SwiGLU of every expert, as three grouped matrix products.

    How many experts there are is read from the parameters, so that a shard of them works the same.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        E, D, F = config.moe.experts, config.hidden_size, config.moe.expert_ffn_size
        self.gate_proj = nn.Parameter(torch.empty(E, F, D))
        self.up_proj = nn.Parameter(torch.empty(E, F, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F))

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """x (M, D), its rows sorted by expert -> (M, D).

        counts_E: int64, how many rows are each expert's, in the order of this module's own. The host never reads it.
        """
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        product = _grouped if x_MD.dtype == torch.bfloat16 else _grouped_uncompiled
        inner_MF = functional.silu(product(x_MD, self.gate_proj, ends_E)) * product(x_MD, self.up_proj, ends_E)
        return product(inner_MF, self.down_proj, ends_E)


class MoE(nn.Module):
    """The experts that a router chooses for each token, and the shared ones that all tokens take.

    sum_over_sequence: counts (B, E) of each sequence's tokens here -> of the whole sequence; replaced from outside
        where others hold the rest of it.
    load_E: int64, token-expert pairs by expert since the last `take_load`, of micro-batches that were learned from.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.moe = config.moe
        self.router = Router(config)
        self.experts = Experts(config)
        width = self.moe.shared_experts * self.moe.expert_ffn_size
        self.shared_experts = MLP(config.hidden_size, width) if width else None
        self.sum_over_sequence: Callable[[Tensor], Tensor] = _unchanged
        self.load_E: Tensor
        self.register_buffer("load_E", torch.zeros(self.moe.experts, dtype=torch.int64), persistent=False)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> y (B, T, D), and the losses of the router, see `auxiliary_loss`; 0 where it does not train."""
        routing = self.router(x_BTD)
        counts_BE = count_pairs(routing.experts, self.moe.experts)
        counts_E = counts_BE.sum(dim=0)
        order_M = routing.experts.flatten().argsort(stable=True)
        place_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))

        sorted_MD = _Rows.apply(x_BTD.flatten(0, 1), order_M, place_M, self.moe.experts_per_token)
        pairs_MD = _Rows.apply(self.experts(sorted_MD, counts_E), place_M, order_M, 1)
        pairs_BTKD = pairs_MD.unflatten(0, routing.experts.shape)
        # Weighed and added in fp32, rounded once.
        y_BTD = (pairs_BTKD * routing.weights[..., None]).sum(dim=2).to(x_BTD.dtype)
        y_BTD = _CountInBackward.apply(y_BTD, self.load_E, counts_E)
        if self.shared_experts is not None:
            y_BTD = y_BTD + self.shared_experts(x_BTD)
        if not self.training:
            return y_BTD, y_BTD.new_zeros((), dtype=torch.float32)
        return y_BTD, auxiliary_loss(routing, counts_BE, self.moe, self.sum_over_sequence)

    def take_load(self) -> Tensor:
        """The load by expert since the last call, (E,) int64, and begin anew."""
        load_E = self.load_E.clone()
        self.load_E.zero_()
        return load_E


def _grouped(x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Each group of rows, up to its end, times its own weight: (M, in) -> (M, out)."""
    return functional.grouped_mm(x_MI, weight_EOI.transpose(1, 2), offs=ends_E)


# torch.compile knows what shape a grouped product has in bf16 only: in other dtypes the graph breaks here.
_grouped_uncompiled = torch.compiler.disable(_grouped)


def _unchanged(counts_BE: Tensor) -> Tensor:
    return counts_BE


class _Rows(torch.autograd.Function):
    """Rows of x, each used `copies` times: row m of the result is x[index[m] // copies].

    `inverse` is the inverse permutation of `index`. With it the gradient is gathered as well, and the copies of a row
    are added in a fixed order; an indexed addition would be atomic on a GPU, in an order that changes from run to run.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, index_M: Tensor, inverse_M: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse_M)
        ctx.copies = copies
        return x_ND[index_M // copies if copies > 1 else index_M]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_M,) = ctx.saved_tensors
        grad_MD = grad_MD[inverse_M]
        return grad_MD if ctx.copies == 1 else grad_MD.unflatten(0, (-1, ctx.copies)).sum(dim=1), None, None, None


class _CountInBackward(torch.autograd.Function):
    """x as it is; its backward adds the counts to the load. A backward pass runs once for each micro-batch that is
    learned from, however often activation checkpointing runs the forward, and never in validation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, load_E: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(counts_E)
        ctx.load_E = load_E
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (counts_E,) = ctx.saved_tensors
        ctx.load_E.add_(counts_E)
        return grad, None, None
