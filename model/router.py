"""Which experts a token goes to, and the losses that keep them evenly loaded.

B batch, T sequence, D model width, E experts, K experts a token takes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.config import ModelConfig, MoEConfig


class Routing(NamedTuple):
    """Where tokens go. logits, scores (B, T, E) fp32; experts (B, T, K) int64, of each token, the best first; weights
    (B, T, K) fp32, what each of their outputs is multiplied by."""

    logits: Tensor
    scores: Tensor
    experts: Tensor
    weights: Tensor


class Router(nn.Module):
    """Scores of the experts, a linear map of the token, and the choice by them (DeepSeek-V3, Liu et al. 2024, arXiv
    2412.19437, equations 12 to 16, of which Mixtral's softmax without bias and groups is a case).

    Weight, bias and all that is computed here are fp32, whatever the model is cast to.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.moe: MoEConfig = config.moe
        self.weight = nn.Parameter(torch.empty(self.moe.experts, config.hidden_size, dtype=torch.float32))
        self.bias: Tensor | None
        has_bias = self.moe.balance == "bias"
        self.register_buffer("bias", torch.zeros(self.moe.experts, dtype=torch.float32) if has_bias else None)

    def forward(self, x_BTD: Tensor) -> Routing:
        """x (B, T, D) of any dtype. Nothing is random: equal inputs are routed alike, when recomputed too."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            logits_BTE = _Logits.apply(x_BTD.flatten(0, 1), self.weight).unflatten(0, x_BTD.shape[:2])
        scores_BTE = logits_BTE.softmax(dim=-1) if self.moe.router == "softmax" else logits_BTE.sigmoid()
        experts_BTK = self._choice(scores_BTE.detach())
        weights_BTK = scores_BTE.gather(-1, experts_BTK)
        if self.moe.normalize_weights:
            weights_BTK = weights_BTK / (weights_BTK.sum(dim=-1, keepdim=True) + 1e-20)  # sigmoids can all be 0
        return Routing(logits_BTE, scores_BTE, experts_BTK, weights_BTK * self.moe.routed_scaling_factor)

    @torch.no_grad()
    def update_bias(self, load_E: Tensor) -> None:
        """After a step: move each expert's bias by `bias_update_rate` against its load (DeepSeek-V3, section 2.1.2).

        load: pairs (int64) of the whole global batch. An expert at the mean keeps its bias.
        """
        assert self.bias is not None, "only balance=bias has one"
        self.bias += self.moe.bias_update_rate * (load_E.sum() - load_E * len(load_E)).sign()

    def _choice(self, scores_BTE: Tensor) -> Tensor:
        """The bias enters here and nowhere else."""
        choice_BTE = scores_BTE if self.bias is None else scores_BTE + self.bias
        groups, kept = self.moe.groups, self.moe.groups_per_token
        if kept < groups:
            choice_BTGe = choice_BTE.unflatten(-1, (groups, -1))
            best_BTG = choice_BTGe.topk(min(2, choice_BTGe.size(-1)), dim=-1).values.sum(dim=-1)
            kept_BTG = torch.zeros_like(best_BTG, dtype=torch.bool).scatter_(-1, best_BTG.topk(kept).indices, True)
            choice_BTE = choice_BTGe.masked_fill(~kept_BTG[..., None], -torch.inf).flatten(-2)
        return choice_BTE.topk(self.moe.experts_per_token, dim=-1).indices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """A cast of the model (`.bfloat16()`, `.to(dtype)`) passes by; a move to another device does not."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class _Logits(torch.autograd.Function):
    """x (N, D) times the weight (E, D), in fp32: (N, E). What is kept of x is x, and not its copy in fp32."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_ED)
        return x_ND.float() @ weight_ED.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NE: Tensor) -> tuple[Tensor, Tensor]:
        x_ND, weight_ED = ctx.saved_tensors
        return (grad_NE @ weight_ED).to(x_ND.dtype), grad_NE.T @ x_ND.float()


def count_pairs(experts_BTK: Tensor, experts: int) -> Tensor:
    """Token-expert pairs of each sequence by expert, (B, E) int64."""
    chosen_BM = experts_BTK.flatten(1)
    return chosen_BM.new_zeros(len(chosen_BM), experts).scatter_add_(1, chosen_BM, torch.ones_like(chosen_BM))


def auxiliary_loss(
    routing: Routing, counts_BE: Tensor, moe: MoEConfig, sum_over_sequence: Callable[[Tensor], Tensor]
) -> Tensor:
    """What the balance of load and the router's logits cost, scalar fp32, a sum over the batch's sequences of

    - with balance=aux_loss, `balance_coefficient` times E sum_i f_i P_i, f_i being the share of the sequence's
      token-expert pairs that expert i has, P_i its mean score, scores of a token adding up to 1 (Switch Transformer,
      arXiv 2101.03961, equations 4 to 6; per sequence, as DeepSeek-V3's equations 17 to 20). Even load costs 1;
    - `z_loss` times the mean of log^2 Z over its tokens (ST-MoE, arXiv 2202.08906, equation 5).

    counts_BE: of the tokens at hand, which may be a part of each sequence: `sum_over_sequence` then adds up the counts
        of its parts, and this is the part's share of the loss: the sum over parts is the whole, its gradient too.
    """
    balance = moe.balance_coefficient if moe.balance == "aux_loss" else 0.0
    auxiliary = routing.logits.new_zeros(())
    if not balance and not moe.z_loss:
        return auxiliary
    counts_BE = sum_over_sequence(counts_BE)
    pairs_B1 = counts_BE.sum(dim=-1, keepdim=True)
    tokens_B1 = pairs_B1 / moe.experts_per_token
    if balance:
        scores_BTE = routing.scores
        if moe.router == "sigmoid":
            scores_BTE = scores_BTE / (scores_BTE.sum(dim=-1, keepdim=True) + 1e-20)
        mean_score_BE = scores_BTE.sum(dim=1) / tokens_B1
        auxiliary = auxiliary + balance * moe.experts * (counts_BE / pairs_B1 * mean_score_BE).sum()
    if moe.z_loss:
        squares_BT = routing.logits.logsumexp(dim=-1).square()
        auxiliary = auxiliary + moe.z_loss * (squares_BT / tokens_B1).sum()
    return auxiliary
