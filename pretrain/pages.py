"""Memory that the system has back as soon as it is let go of.

What `malloc` is given back it mostly keeps, and holes between small things that stay are not used again for aligned
memory of the same size: reading a model tensor by tensor, each dropped before the next, would come to hold all of it.
"""

import math
import mmap

import torch
from torch import Tensor

_WORTH_PAGES_BYTES = 1 << 18


def empty_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU to write into. It is zero if it is large, else whatever was there."""
    size_bytes = math.prod(shape) * dtype.itemsize
    if size_bytes < _WORTH_PAGES_BYTES:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size_bytes), dtype=dtype).view(shape)
