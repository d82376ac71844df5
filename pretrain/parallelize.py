"""What is done to a pure model from outside, in one stated order: activation checkpointing."""

import functools

from torch.utils.checkpoint import checkpoint

from model.decoder import Decoder
from pretrain.config import ParallelConfig


def parallelize(decoder: Decoder, parallel: ParallelConfig) -> Decoder:
    """Apply the layout in place. Parameters keep their names and their values."""
    if parallel.activation_checkpointing == "full":
        for block in decoder.layers:
            # The block's own forward is replaced rather than the block: a wrapping module would rename its parameters.
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return decoder
