"""Cross-entropy of a linear head that never holds the logits of all tokens.

N tokens, C tokens of a chunk, R of a piece of it, D model width, V vocabulary (padded), logits = hidden @ weight.T; v
rows of the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED_TARGET = -100
CHUNK_TOKENS = 1024
SOFTMAX_ELEMENTS = 1 << 19
# Of the weight's gradient, worked on at a time.
GRADIENT_ROWS = 8192


class LossSums(NamedTuple):
    """Sums over the valid targets, scalars in fp32; who knows how many tokens the global batch counts divides.

    total: differentiable, the negative log-likelihoods plus z_loss times the squared log-partition functions.
    nll: detached, the negative log-likelihoods (nats) alone.
    auxiliary: differentiable, a sum over sequences, not targets: the losses of routers, see `MoE`. The head has none.
    """

    total: Tensor
    nll: Tensor
    auxiliary: Tensor | float = 0.0


@dataclass(frozen=True)
class VocabularyPart:
    """Which rows of the vocabulary a weight holds, if others hold the rest; a weight that holds all is `WHOLE`.

    start: the first row. maximum, total: from a tensor of this part's values to that of all parts, elementwise.
    """

    start: int
    maximum: Callable[[Tensor], Tensor]
    total: Callable[[Tensor], Tensor]


WHOLE = VocabularyPart(0, maximum=lambda x: x, total=lambda x: x)
# (logits, targets, z_loss, losses, log-partitions, whether the gradient is needed, part): see `softmax_loss`.
SoftmaxLoss = Callable[[Tensor, Tensor, float, Tensor, Tensor, bool, VocabularyPart], None]


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    vocab_size: int,
    z_loss: float = 0.0,
    chunk_tokens: int = CHUNK_TOKENS,
    part: VocabularyPart = WHOLE,
    softmax: SoftmaxLoss | None = None,
) -> LossSums:
    """Sum over tokens of the cross-entropy of softmax(hidden @ weight.T), a chunk of tokens at a time.

    vocab_size: columns from here on only pad, and have no probability.
    z_loss: coefficient of log(Z)^2 (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, section 5).
    part: if the weight holds a part of the vocabulary, then so does its gradient, and the hidden states' gradient is
        this part's share: the sum over parts is the whole.
    softmax: how a chunk's logits become its losses and their own gradient; default `softmax_loss`.
    A target of -100 does not count. Products run in the inputs' dtype (autocast's, if on), the softmax in fp32.
    """
    device_type = hidden_ND.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    with torch.autocast(device_type, enabled=False):
        # Inside forward gradients are always off, and needs_input_grad says nothing of no_grad around it.
        with_grads = torch.is_grad_enabled()
        total, nll_N = _LinearCrossEntropy.apply(
            hidden_ND, weight_VD, targets_N, vocab_size, z_loss, chunk_tokens, with_grads, part, softmax or softmax_loss
        )
    return LossSums(total, nll_N.sum())


def linear_cross_entropy_tokens(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    vocab_size: int,
    chunk_tokens: int = CHUNK_TOKENS,
    softmax: SoftmaxLoss | None = None,
) -> Tensor:
    """Negative log-likelihood (nats) of each token, (N,) fp32, 0 where the target is -100. Not differentiable."""
    with torch.no_grad():
        _, nll_N = _LinearCrossEntropy.apply(
            hidden_ND, weight_VD, targets_N, vocab_size, 0.0, chunk_tokens, False, WHOLE, softmax or softmax_loss
        )
    return nll_N


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made with the loss, chunk by chunk, while the chunk's softmax is at hand; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        vocab_size: int,
        z_loss: float,
        chunk_tokens: int,
        with_grads: bool,
        part: VocabularyPart,
        softmax: SoftmaxLoss,
    ) -> tuple[Tensor, Tensor]:
        N, V = len(targets_N), len(weight_VD)
        needs_hidden, needs_weight = (with_grads and needed for needed in ctx.needs_input_grad[:2])
        needs_grad = needs_hidden or needs_weight
        nll_N, log_partition_N = hidden_ND.new_empty((2, N), dtype=torch.float32)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        # Summed over chunks in fp32: in bf16 each addition would round the sum again.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        # One buffer for all chunks: fresh memory of this size costs more than what is computed in it.
        logits_buffer = hidden_ND.new_empty(min(chunk_tokens, N), V)
        for start in range(0, N, chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, N))
            logits_CV = torch.mm(hidden_ND[chunk], weight_VD.T, out=logits_buffer[: chunk.stop - start])
            # The least number: its exponential is 0 beside any other's, and a part that is nothing else has one still.
            logits_CV[:, max(0, vocab_size - part.start) :] = torch.finfo(logits_CV.dtype).min
            softmax(logits_CV, targets_N[chunk], z_loss, nll_N[chunk], log_partition_N[chunk], needs_grad, part)
            if grad_hidden_ND is not None:
                torch.mm(logits_CV, weight_VD, out=grad_hidden_ND[chunk])
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, logits_CV, hidden_ND[chunk])
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.mark_non_differentiable(nll_N)
        total = nll_N.sum()
        if z_loss:
            total += z_loss * log_partition_N.square().sum()
        return total, nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if grad is None else _scaled(grad, grad_total, dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None, None, None, None


def _add_product(sum_VD: Tensor, logits_CV: Tensor, hidden_CD: Tensor) -> None:
    """sum += logits.T @ hidden, by parts: neither the product nor the fp32 copy of it that is added is there whole."""
    for start in range(0, len(sum_VD), GRADIENT_ROWS):
        rows = slice(start, start + GRADIENT_ROWS)
        sum_VD[rows] += logits_CV[:, rows].T @ hidden_CD


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor in `dtype`, multiplied in fp32: rounded to bf16, the factor 1 / tokens would be off by up to 0.2 %,
    and the gradient's norm with it."""
    scaled = torch.empty_like(grad, dtype=dtype)
    for start in range(0, len(grad), GRADIENT_ROWS):
        rows = slice(start, start + GRADIENT_ROWS)
        scaled[rows] = grad[rows].float() * factor
    return scaled


def softmax_loss(
    logits_CV: Tensor,
    targets_C: Tensor,
    z_loss: float,
    nll_C: Tensor,
    log_partition_C: Tensor,
    needs_grad: bool,
    part: VocabularyPart,
) -> None:
    """Fill `nll_C` and `log_partition_C` (fp32, 0 where the target does not count); with `needs_grad`, replace the
    logits by the gradient of the loss: p (1 + 2 z_loss log Z) - onehot(target), with p = softmax(logits).

    Some rows at a time, so that the passes over the vocabulary stay in the processor's cache, and its fp32 copy small;
    a part of the vocabulary is smaller, and takes all rows at once, its maxima and sums being other ranks' business.
    """
    C, V = logits_CV.shape
    rows = max(1, SOFTMAX_ELEMENTS // V) if part is WHOLE else C
    buffer = logits_CV.new_empty((min(rows, C), V), dtype=torch.float32)
    for start in range(0, C, rows):
        piece = slice(start, min(start + rows, C))
        logits_RV, valid_R1 = logits_CV[piece], (targets_C[piece] != IGNORED_TARGET)[:, None]
        row_R1 = targets_C[piece][:, None] - part.start
        held_R1 = valid_R1 & (row_R1 >= 0) & (row_R1 < V)
        row_R1 = row_R1.clamp(0, V - 1)
        p_RV = buffer[: piece.stop - start].copy_(logits_RV)
        target_logit_R1 = p_RV.gather(1, row_R1).where(held_R1, 0.0)
        own_max_R1 = p_RV.amax(dim=1, keepdim=True)
        torch.softmax(p_RV, dim=1, out=p_RV)
        # Softmax keeps its sum to itself. The largest probability, 1 / V or more, is that sum's inverse.
        own_log_partition_R1 = own_max_R1 - p_RV.amax(dim=1, keepdim=True).log()
        max_R1 = part.maximum(own_log_partition_R1.clone())
        sums_R2 = part.total(torch.cat([(own_log_partition_R1 - max_R1).exp(), target_logit_R1], dim=1))
        partition_R1, target_logit_R1 = sums_R2.split(1, dim=1)
        log_partition_R1 = partition_R1.log() + max_R1
        nll_C[piece] = (log_partition_R1 * valid_R1 - target_logit_R1)[:, 0]
        log_partition_C[piece] = (log_partition_R1 * valid_R1)[:, 0]
        if needs_grad:
            share_R1 = (own_log_partition_R1 - log_partition_R1).exp()  # of all probability, in this part
            p_RV *= valid_R1 * share_R1 * (1 + 2 * z_loss * log_partition_R1)
            # The target's entry is subtracted before it is rounded to the logits' dtype.
            logits_RV.copy_(p_RV.scatter_add_(1, row_R1, -held_R1.float()))
