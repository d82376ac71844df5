"""Cross-entropy of a linear head that never holds the logits of all tokens.

N tokens, C tokens of a chunk, D model width, V vocabulary (padded), logits = hidden @ weight.T.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED_TARGET = -100
CHUNK_TOKENS = 512


class LossSums(NamedTuple):
    """Sums over the valid targets, scalars in fp32; who knows how many tokens the global batch counts divides.

    total: differentiable, the negative log-likelihoods plus z_loss times the squared log-partition functions.
    nll: detached, the negative log-likelihoods (nats) alone.
    """

    total: Tensor
    nll: Tensor


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    vocab_size: int,
    z_loss: float = 0.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> LossSums:
    """Sum over tokens of the cross-entropy of softmax(hidden @ weight.T), a chunk of tokens at a time.

    vocab_size: columns from here on only pad, and have no probability.
    z_loss: coefficient of log(Z)^2 (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, section 5).
    A target of -100 does not count. Products run in the inputs' dtype (autocast's, if on), the softmax in fp32.
    """
    device_type = hidden_ND.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    with torch.autocast(device_type, enabled=False):
        total, nll_N = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, vocab_size, z_loss, chunk_tokens)
    return LossSums(total, nll_N.sum())


def linear_cross_entropy_tokens(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, vocab_size: int, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Negative log-likelihood (nats) of each token, (N,) fp32, 0 where the target is -100. Not differentiable."""
    with torch.no_grad():
        _, nll_N = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, vocab_size, 0.0, chunk_tokens)
    return nll_N


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made with the loss, chunk by chunk, while the chunk's softmax is at hand; backward scales them.

    With p = softmax(logits), the gradient of a token's loss by its logits is p (1 + 2 z_loss log Z) - onehot(target).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        vocab_size: int,
        z_loss: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        # Summed over chunks in fp32: in bf16 each addition would round the sum again.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        nll_N = hidden_ND.new_empty(len(targets_N), dtype=torch.float32)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for start in range(0, len(targets_N), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            hidden_CD, targets_C = hidden_ND[chunk], targets_N[chunk]
            valid_C = (targets_C != IGNORED_TARGET).float()
            target_C1 = targets_C.clamp(min=0)[:, None]
            logits_CV = hidden_CD @ weight_VD.T
            logits_CV[:, vocab_size:] = -torch.inf

            p_CV = logits_CV.float()
            target_logit_C = p_CV.gather(1, target_C1)[:, 0]
            max_C1 = p_CV.amax(dim=1, keepdim=True)
            partition_C1 = p_CV.sub_(max_C1).exp_().sum(dim=1, keepdim=True)
            log_partition_C = (partition_C1.log() + max_C1)[:, 0]
            nll_N[chunk] = (log_partition_C - target_logit_C) * valid_C
            total += torch.sum(nll_N[chunk] + z_loss * log_partition_C.square() * valid_C)
            if not (needs_hidden or needs_weight):
                continue

            scale_C = valid_C * (1 + 2 * z_loss * log_partition_C)
            p_CV *= scale_C[:, None] / partition_C1
            target_grad_C1 = p_CV.gather(1, target_C1) - valid_C[:, None]
            grad_logits_CV = logits_CV.copy_(p_CV).scatter_(1, target_C1, target_grad_C1.to(logits_CV.dtype))
            if grad_hidden_ND is not None:
                torch.mm(grad_logits_CV, weight_VD, out=grad_hidden_ND[chunk])
            if grad_weight_VD is not None:
                grad_weight_VD += grad_logits_CV.T @ hidden_CD
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.mark_non_differentiable(nll_N)
        return total, nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None, None, None
