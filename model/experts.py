"""The experts that a router chooses among: SwiGLU of each, weighted and added up, with a backward of its own.

N tokens, K experts a token takes, E experts, D model width, F inner width of one, P slots of token-expert pairs sorted
by expert.

y_n = sum_k w_nk W_down (silu(W_gate x_n) * W_up x_n), by expert e(n, k). Only the two products before the activation
are kept for backward, and x once a token. What else it wants is gathered or computed again. The experts' outputs it
does not want: the derivative by w_nk, <dy_n, W_down a>, is <W_down^T dy_n, a>, of which backward needs the left side in
any case (SonicMoE, Guo et al. 2025, arXiv 2512.14080, section 3.2).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from model.config import ModelConfig
from model.token_rows import row_products, scaled, slots, weighted_sum


class Experts(nn.Module):
    """How many experts there are is read from the parameters, so that a shard of them works the same."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        E, D, F = config.moe.experts, config.hidden_size, config.moe.expert_ffn_size
        self.gate_proj = nn.Parameter(torch.empty(E, F, D))
        self.up_proj = nn.Parameter(torch.empty(E, F, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F))
        self.function = combined

    def forward(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, counts_E: Tensor) -> Tensor:
        """x (N, D) -> the weighted sum of what each token's experts make of it, (N, D).

        experts_NK: int64, of this module's own. weights_NK: fp32.
        counts_E: int64, how many pairs are each expert's. The host never reads it.
        """
        return self.function(x_ND, experts_NK, weights_NK, counts_E, self.gate_proj, self.up_proj, self.down_proj)


def combined(
    x_ND: Tensor,
    experts_NK: Tensor,
    weights_NK: Tensor,
    counts_E: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
) -> Tensor:
    """See `Experts.forward`."""
    at = slots(experts_NK, counts_E)
    tokens_P = at.pairs // experts_NK.size(1)
    # A slot that pads has no weight, in the sums below and so in every gradient of a parameter.
    weights_P = weights_NK.detach().flatten()[at.pairs] * at.real
    return _Experts.apply(x_ND, weights_NK, gate_EFD, up_EFD, down_EDF, tokens_P, weights_P, at.places, at.ends)


class _Experts(torch.autograd.Function):
    """Multiplied out of place, as in `gated`. The parameters themselves are saved, not views of them, which would hold
    ZeRO 3's gathered memory until backward.

    tokens_P, weights_P: of each slot; places_M, ends_E: see `Slots`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_NK: Tensor,
        gate_EFD: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
        tokens_P: Tensor,
        weights_P: Tensor,
        places_M: Tensor,
        ends_E: Tensor,
    ) -> Tensor:
        x_PD = x_ND.index_select(0, tokens_P)
        gate_PF = _by_expert(x_PD, gate_EFD.transpose(1, 2), ends_E)
        up_PF = _by_expert(x_PD, up_EFD.transpose(1, 2), ends_E)
        del x_PD
        ctx.save_for_backward(
            x_ND, weights_NK, gate_EFD, up_EFD, down_EDF, tokens_P, weights_P, places_M, ends_E, gate_PF, up_PF
        )
        y_PD = _by_expert(functional.silu(gate_PF) * up_PF, down_EDF.transpose(1, 2), ends_E)
        return weighted_sum(y_PD, places_M, weights_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weights_NK, gate_EFD, up_EFD, down_EDF, tokens_P, weights_P, places_M, ends_E, gate_PF, up_PF = (
            ctx.saved_tensors
        )
        grad_PD = grad_ND.index_select(0, tokens_P)
        grad_inner_PF = _by_expert(grad_PD, down_EDF, ends_E)
        activated_PF = functional.silu(gate_PF)
        inner_PF = activated_PF * up_PF
        grad_weights_NK = row_products(grad_inner_PF, inner_PF)[places_M].view_as(weights_NK)
        grad_down_EDF = _by_expert(scaled(grad_PD, weights_P).T, inner_PF, ends_E)
        del grad_PD, inner_PF

        # A slot's weight multiplies its row of each of these, and is left out until it meets x, or the sum over k.
        grad_up_PF = activated_PF * grad_inner_PF
        del activated_PF
        grad_inner_PF = grad_inner_PF * up_PF
        grad_gate_PF = torch.ops.aten.silu_backward(grad_inner_PF, gate_PF)
        del grad_inner_PF
        x_PD = scaled(x_ND.index_select(0, tokens_P), weights_P)
        grad_gate_EFD = _by_expert(grad_gate_PF.T, x_PD, ends_E)
        grad_up_EFD = _by_expert(grad_up_PF.T, x_PD, ends_E)
        del x_PD
        grad_x_PD = _by_expert(grad_gate_PF, gate_EFD, ends_E) + _by_expert(grad_up_PF, up_EFD, ends_E)
        grad_x_ND = weighted_sum(grad_x_PD, places_M, weights_NK)
        return grad_x_ND, grad_weights_NK, grad_gate_EFD, grad_up_EFD, grad_down_EDF, None, None, None, None


def _by_expert(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows of a times its matrix of b; or, both being 2-D, its columns of a times its rows of b."""
    # A rank among expert-parallel ones may get no token. A GPU's kernel refuses what has no rows to sum over.
    if b.dim() == 2 and not len(b):
        return a.new_zeros(len(ends_E), len(a), b.size(1))
    return functional.grouped_mm(a, b, offs=ends_E)
