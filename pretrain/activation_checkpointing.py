"""Activation checkpointing: which of a block's activations are kept for backward, and which are computed again.

none       every activation that backward needs is kept
selective  the outputs of KEPT are kept, what lies between them is computed again: norms, rotations, SwiGLU's product,
           residual additions, and the communication of tensor, sequence and expert parallelism
full       only the block's input is kept (Chen et al. 2016, arXiv 1604.06174)

Nothing random happens in a block, so no random state is kept. Recomputation calls the block's forward once more within
backward, on every rank in the same order, so collectives in it meet.
"""

import functools
from collections import deque
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model.decoder import Decoder
from model.opaque_attention import OPERATOR
from pretrain.config import ParallelConfig

# The products that take most of a block's time: of matrices, of experts' matrices, and attention on each device.
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
    OPERATOR,  # a processor's
}


def apply_activation_checkpointing(decoder: Decoder, parallel: ParallelConfig) -> None:
    """Checkpoint every `activation_checkpointing_every`-th block, the first among them.

    The block's own forward is replaced rather than the block: a wrapping module would rename its parameters.
    """
    if parallel.activation_checkpointing == "none":
        return
    checkpointed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if parallel.activation_checkpointing == "selective":
        # The compiler goes by torch's own way to say what is kept; under a mode of ours it would compile nothing.
        context = _keep_compiled if parallel.compile else _keep_and_replay
        checkpointed = functools.partial(checkpointed, context_fn=context)
    for block in list(decoder.layers)[:: parallel.activation_checkpointing_every]:
        block.forward = functools.partial(checkpointed, block.forward)


def _keep_and_replay() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Around a block's forward, and around its recomputation.

    torch's own (`create_selective_checkpoint_contexts`) refuses a recomputation with other operations in it than the
    forward had, such as ZeRO 3's gathering of parameters.
    """
    kept: deque[Any] = deque()
    return _Keep(kept), _Replay(kept)


def _keep_compiled() -> tuple[Any, Any]:
    """As `_keep_and_replay`, for a block that is compiled together with its recomputation."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


class _Keep(TorchDispatchMode):
    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """A part that is compiled by itself (`FlexAttention`'s kernel) stays so, unseen, and is computed again."""
        return True

    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in KEPT:
            self.kept.append(out)
        return out


class _Replay(_Keep):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.kept.popleft() if func in KEPT else func(*args, **(kwargs or {}))
