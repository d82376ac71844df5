"""Mixture of experts in place of an MLP, without a capacity: no token is dropped.

B batch, T sequence, D model width, E experts, K experts a token takes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.config import ModelConfig
from model.experts import Experts
from model.mlp import MLP
from model.router import Router, auxiliary_loss, count_pairs


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
        y_ND = self.experts(x_BTD.flatten(0, 1), routing.experts.flatten(0, 1), routing.weights.flatten(0, 1), counts_E)
        y_BTD = y_ND.view_as(x_BTD)
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


def _unchanged(counts_BE: Tensor) -> Tensor:
    return counts_BE


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
