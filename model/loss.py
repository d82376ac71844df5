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
CHUNK_TOKENS = 2048
SOFTMAX_ELEMENTS = 1 << 19
# Of the weight's gradient, transposed, worked on at a time: columns as they are added, rows as they are scaled.
GRADIENT_COLUMNS = 8192
GRADIENT_ROWS = 64


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
        grad_weight_DV = weight_VD.new_empty(weight_VD.T.shape, dtype=torch.float32) if needs_weight else None
        if grad_weight_DV is not None and N == 0:
            grad_weight_DV.zero_()  # no chunk will fill it
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
            if grad_weight_DV is not None:
                _add_product(grad_weight_DV, hidden_ND[chunk], logits_CV, first=start == 0)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_DV)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(nll_N)
        total = nll_N.sum()
        if z_loss:
            total += z_loss * log_partition_N.square().sum()
        return total, nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        sum_ND, sum_DV = ctx.saved_tensors
        grad_hidden_ND = grad_weight_VD = None
        if sum_ND is not None:
            grad_hidden_ND = torch.empty_like(sum_ND)
            _scale(sum_ND, grad_total, CHUNK_TOKENS, into=grad_hidden_ND)
        if sum_DV is not None:
            grad_weight_VD = sum_DV.new_empty(sum_DV.T.shape, dtype=ctx.weight_dtype)
            _scale(sum_DV, grad_total, GRADIENT_ROWS, into=grad_weight_VD.T)
        return grad_hidden_ND, grad_weight_VD, None, None, None, None, None, None, None


def _add_product(sum_DV: Tensor, hidden_CD: Tensor, logits_CV: Tensor, first: bool) -> None:
    """sum += hidden.T @ logits, by parts: neither the product nor the fp32 copy of it that is added is there whole.

    The gradient of the weight as it lies, logits.T @ hidden, takes a processor longer: of the two, logits are the
    larger matrix to transpose.
    """
    hidden_DC = hidden_CD.T.contiguous()
    for start in range(0, sum_DV.size(1), GRADIENT_COLUMNS):
        columns = slice(start, start + GRADIENT_COLUMNS)
        product_Dv = hidden_DC @ logits_CV[:, columns]
        if first:
            sum_DV[:, columns] = product_Dv
        else:
            sum_DV[:, columns] += product_Dv


def _scale(grad: Tensor, factor: Tensor, rows: int, into: Tensor) -> None:
    """into = grad * factor, some rows at a time, multiplied in fp32: rounded to bf16, the factor 1 / tokens would be
    off by up to 0.2 %, and the gradient's norm with it."""
    for start in range(0, len(grad), rows):
        part = slice(start, start + rows)
        into[part] = (grad[part].float() * factor).to(into.dtype)


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
    valid_C, row_C = targets_C != IGNORED_TARGET, targets_C - part.start
    held_C = valid_C & (row_C >= 0) & (row_C < V)
    # Read and written by index: on processors scatter takes as long as the softmax.
    place_C, row_C = torch.arange(C, device=row_C.device), row_C.clamp(0, V - 1)
    target_logit_C = logits_CV[place_C, row_C].float().where(held_C, 0.0)
    p_target_C = torch.empty_like(target_logit_C)
    for start in range(0, C, rows):
        piece = slice(start, min(start + rows, C))
        p_RV = buffer[: piece.stop - start].copy_(logits_CV[piece])
        max_R1 = p_RV.amax(dim=1, keepdim=True)
        # By hand: torch.softmax keeps its sum to itself, and has a pass of its own to divide by it.
        sum_R = p_RV.sub_(max_R1).exp_().sum(dim=1)
        own_log_partition_R = sum_R.log() + max_R1[:, 0]
        log_partition_R, target_logit_C[piece] = _of_all_parts(own_log_partition_R, target_logit_C[piece], part)
        log_partition_C[piece] = log_partition_R
        if needs_grad:
            share_R = (own_log_partition_R - log_partition_R).exp()  # of all probability, in this part
            p_RV *= (valid_C[piece] * share_R * (1 + 2 * z_loss * log_partition_R) / sum_R)[:, None]
            p_target_C[piece] = p_RV[place_C[: len(p_RV)], row_C[piece]]
            logits_CV[piece] = p_RV
    if needs_grad:
        # One is subtracted before the target's entry is rounded to the logits' dtype.
        logits_CV[place_C, row_C] = (p_target_C - held_C.float()).to(logits_CV.dtype)
    torch.sub(log_partition_C, target_logit_C, out=nll_C).mul_(valid_C)
    log_partition_C.mul_(valid_C)


def _of_all_parts(log_partition_R: Tensor, target_logit_R: Tensor, part: VocabularyPart) -> tuple[Tensor, Tensor]:
    """The log-partitions and the targets' logits over all parts, from this part's."""
    if part is WHOLE:
        return log_partition_R, target_logit_R
    max_R = part.maximum(log_partition_R.clone())
    sums_R2 = part.total(torch.stack([(log_partition_R - max_R).exp(), target_logit_R], dim=1))
    return sums_R2[:, 0].log() + max_R, sums_R2[:, 1]
