"""Which kernels a decoder computes with, by device. The maths is the same in each.

                    processor            GPU                               GPU, model.document_mask
    attention       BlockwiseAttention   CausalAttention: torch's flash    FlexAttention
    document mask   firsts, (B, T)       none                              blocks of tokens, (B, 1, T / 128, T / 128)
    head's softmax  torch's operations   two Triton kernels                two Triton kernels
    RMSNorm         in pieces            torch's kernel                    torch's kernel
    RoPE            in pieces            torch's operations                torch's operations

BlockwiseAttention takes torch's kernel for processors where that is faster. torch's flash attention for GPUs takes no
mask, and with a dense one would not be chosen. Triton comes with torch where torch has kernels for a GPU; where it is
missing, the head's softmax is the processor's. The optimizer (torch's fused AdamW) and grouped products of experts
choose by themselves. What is chosen for GPUs has not been timed on one.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch

from model.attention import Attention, CausalAttention
from model.blockwise_attention import BlockwiseAttention, document_spans
from model.decoder import Decoder
from model.document_attention import FlexAttention, compiled_kernel, document_blocks
from model.loss import SoftmaxLoss, softmax_loss
from model.norm import RMSNorm, rms_norm, rms_norm_in_pieces
from model.opaque_attention import OpaqueBlockwiseAttention
from model.rope import rotate, rotate_in_pieces
from pretrain.compile import MOST_VERSIONS
from pretrain.config import ParallelConfig
from pretrain.device import is_processor


def apply_kernels(decoder: Decoder, device: torch.device, parallel: ParallelConfig = ParallelConfig()) -> None:
    """Give a decoder the kernels for a device, before anything hooks its modules (tensor and sequence parallelism).

    parallel: what will be done to its blocks, by default nothing. Compiled, they want plain operations, which the
        compiler fuses itself, and no loops in its way. And selective checkpointing keeps the results of products: those
        inside attention are scores of all pairs, so it is shown attention as one operation.
    """
    shown_whole = parallel.compile or parallel.activation_checkpointing == "selective"
    core: Callable[[], CausalAttention] = CausalAttention
    if is_processor(device):
        core = OpaqueBlockwiseAttention if shown_whole else BlockwiseAttention
        decoder.document_mask = document_spans
    elif decoder.config.document_mask:
        core, decoder.document_mask = partial(FlexAttention, compiled_kernel(MOST_VERSIONS)), document_blocks
    in_pieces = is_processor(device) and not parallel.compile
    for module in list(decoder.modules()):
        if isinstance(module, RMSNorm):
            module.function = rms_norm_in_pieces if in_pieces else rms_norm
        elif isinstance(module, Attention):
            module.core = core()
            module.rotate = rotate_in_pieces if in_pieces else rotate
    decoder.lm_head.softmax = softmax_kernel(device)


def softmax_kernel(device: torch.device) -> SoftmaxLoss:
    """The head's softmax and loss."""
    if is_processor(device) or find_spec("triton") is None:
        return softmax_loss
    from model.fused_softmax import fused_softmax_loss

    return fused_softmax_loss
