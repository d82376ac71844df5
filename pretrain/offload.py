"""Models larger than the device, or than memory: a block's weights are there while it computes, and no longer.

The embedding, the final norm and the head stay on the device, so that at most they, the largest block and what is being
computed are in its memory. `cpu` keeps the blocks in the host's memory; `disk` reads them where they are stored, in
each forward pass anew. The moving is accelerate's (its hooks around a module's forward).
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import PrefixedDataset
from torch import Tensor, nn

Offload = Literal["cpu", "disk"]
HOST: Offload = "cpu"
"""The host's memory, as torch calls it, too."""


def offload_blocks(
    blocks: Iterable[tuple[str, nn.Module]], weights: Mapping[str, Tensor], device: torch.device
) -> None:
    """Give each block its parameters from `weights` when its forward begins, and take them away when it ends.

    blocks: with their names, by which their parameters' names in `weights` begin. Their buffers must be in memory, and
    go to `device` for good.
    """
    for name, block in blocks:
        own = PrefixedDataset(weights, f"{name}.")
        hook = AlignDevicesHook(device, offload=True, weights_map=own, place_submodules=True)
        add_hook_to_module(block, hook)
