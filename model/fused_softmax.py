"""The head's softmax, loss and gradient as two Triton kernels: each element of the logits is read twice and written
once, where the same in torch's operations passes over an fp32 copy of them half a dozen times.

DeepSpeed's Triton cross-entropy (`deepspeed/runtime/chunked_cross_entropy.py`) does not serve: it wants the logits of
all tokens at once, and a second tensor of that size for their gradient; it has no z-loss, no padded columns, and no
vocabulary that is split over ranks.

For GPUs, on which it has not been timed; the tests run it in Triton's interpreter. Sums are in fp32, their order is
fixed by the shapes: no atomics, so the result is the same bit for bit each time.

C tokens of a chunk, V vocabulary (padded, or this rank's part of it).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.loss import IGNORED_TARGET, VocabularyPart

BLOCK_COLUMNS = 4096
WARPS = 8


def fused_softmax_loss(
    logits_CV: Tensor,
    targets_C: Tensor,
    z_loss: float,
    nll_C: Tensor,
    log_partition_C: Tensor,
    needs_grad: bool,
    part: VocabularyPart,
) -> None:
    """As `model.loss.softmax_loss`, for rows of logits whose elements are neighbours in memory."""
    C, V = logits_CV.shape
    assert logits_CV.stride(1) == 1
    own_max_C, own_sum_C, target_logit_C = logits_CV.new_empty((3, C), dtype=torch.float32)
    targets_C = targets_C.contiguous()
    rows: Any = _row_sums[(C,)]
    rows(
        logits_CV,
        targets_C,
        own_max_C,
        own_sum_C,
        target_logit_C,
        part.start,
        V,
        logits_CV.stride(0),
        BLOCK=BLOCK_COLUMNS,
        num_warps=WARPS,
    )
    max_C = part.maximum(own_max_C.clone())
    partition_C, target_logit_C = part.total(torch.stack([own_sum_C * (own_max_C - max_C).exp(), target_logit_C]))
    valid_C = targets_C != IGNORED_TARGET
    log_partition_C.copy_((partition_C.log() + max_C) * valid_C)
    nll_C.copy_(log_partition_C - target_logit_C)
    if needs_grad:
        scale_C = valid_C * (1 + 2 * z_loss * log_partition_C) / partition_C
        blocks: Any = _gradient[(C, triton.cdiv(V, BLOCK_COLUMNS))]
        blocks(
            logits_CV,
            targets_C,
            max_C,
            scale_C,
            part.start,
            V,
            logits_CV.stride(0),
            BLOCK=BLOCK_COLUMNS,
            num_warps=WARPS,
        )


@triton.jit
def _row_sums(
    logits: tl.tensor,
    targets: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    target_logits: tl.tensor,
    first_row: tl.tensor,
    columns: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Of one token: the largest logit, the sum of exp(logit - largest), and the target's logit, 0 if not held here.

    The sum goes with the maximum so far (Milakov & Gimelshein 2018, arXiv 1805.02867, algorithm 3).
    """
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * row_stride
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit = tl.load(row + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(logit, axis=0))
        # Columns that only pad are minus infinity, and may be all there is: their difference is not a number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(logit - base), axis=0)
        largest = higher
    target = tl.load(targets + token) - first_row
    held = (target >= 0) & (target < columns)
    target_logit = tl.load(row + tl.where(held, target, 0)).to(tl.float32)
    tl.store(maxima + token, largest)
    tl.store(sums + token, total)
    tl.store(target_logits + token, tl.where(held, target_logit, 0.0))


@triton.jit
def _gradient(
    logits: tl.tensor,
    targets: tl.tensor,
    maxima: tl.tensor,
    scales: tl.tensor,
    first_row: tl.tensor,
    columns: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Of one token and one block of columns: exp(logit - largest) scale - onehot(target), in the logit's place."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + token * row_stride + column
    logit = tl.load(place, mask=column < columns, other=float("-inf")).to(tl.float32)
    gradient = tl.exp(logit - tl.load(maxima + token)) * tl.load(scales + token)
    # The target's entry is subtracted before it is rounded to the logits' dtype.
    gradient = tl.where(column == tl.load(targets + token) - first_row, gradient - 1.0, gradient)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=column < columns)
