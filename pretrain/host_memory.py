"""Host memory that a process has freed is kept for its next use, not given back to the kernel.

By default glibc maps each large block anew and unmaps it when it is freed. A training step on a processor does so with
hundreds of tensors, and every page of each is then faulted in and zeroed again: measured, a quarter to a third of the
step's time (`steppe bench train`). The price is that memory freed by one part of a step is not the system's meanwhile,
and some fragmentation: a tenth more at the peak.
"""

import ctypes

# <malloc.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
GROWTH_BYTES = 64 << 20
NEVER = -1


def keep_freed_memory() -> bool:
    """Of this process, from now on; whether its C library can (glibc does, musl and macOS's do not).

    To be called before the tensors are made that it is for.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(
        mallopt(name, value) == 1
        for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, GROWTH_BYTES))
    )
