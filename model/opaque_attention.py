"""`BlockwiseAttention` as one operator of torch's, for torch.compile and for selective checkpointing.

Traced into, its loops over blocks would be unrolled into code that takes minutes to compile and is slower than the
libraries' products and softmax, and where documents begin would be constants of that code, other ones in each batch.
Whoever keeps the results of products for backward would keep its scores.
"""

from typing import Any

import torch
from torch import Tensor

from model.blockwise_attention import BlockwiseAttention, DocumentSpans, attended, gradients, spans_of


class OpaqueBlockwiseAttention(BlockwiseAttention):
    """The same numbers as `BlockwiseAttention`."""

    def blockwise(self, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor, spans: DocumentSpans | None) -> Tensor:
        return _attended(q_BTHh, k_BTKh, v_BTKh, None if spans is None else spans.first)


@torch.library.custom_op("steppe::blockwise_attention", mutates_args=())
def _attended(q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor, first_BT: Tensor | None) -> Tensor:
    return attended(q_BTHh, k_BTKh, v_BTKh, None if first_BT is None else spans_of(first_BT))


@torch.library.custom_op("steppe::blockwise_attention_gradients", mutates_args=())
def _gradients(
    grad_BTHh: Tensor, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor, first_BT: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return gradients(grad_BTHh, q_BTHh, k_BTKh, v_BTKh, None if first_BT is None else spans_of(first_BT))


@_attended.register_fake
def _(q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor, first_BT: Tensor | None) -> Tensor:
    return torch.empty_like(q_BTHh, memory_format=torch.contiguous_format)


@_gradients.register_fake
def _(
    grad_BTHh: Tensor, q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor, first_BT: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BTHh, k_BTKh, v_BTKh))
    return q, k, v


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_BTHh: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(grad_BTHh, *ctx.saved_tensors), None


_attended.register_autograd(_backward, setup_context=_keep)
OPERATOR = torch.ops.steppe.blockwise_attention.default
