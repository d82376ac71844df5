"""Host memory that a process has freed is kept for its next use, not given back to the kernel.

By default glibc maps each large block anew and unmaps it when it is freed. A training step on a processor does so with
hundreds of tensors, and every page of each is then faulted in and zeroed again: measured, a quarter to a third of the
step's time (`steppe bench train`). The price is that memory freed by one part of a step is not the system's meanwhile,
and some fragmentation.

Of that there is less without the cache of small freed blocks that each thread has: those in it are never joined to
their neighbours, and so stand between large freed blocks that could be one (measured in `BENCHMARKS.md`).
"""

import ctypes
from collections.abc import Mapping

# <malloc.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
GROWTH_BYTES = 64 << 20
NEVER = -1
# What glibc reads before a process's first line.
TUNABLES, NO_THREAD_CACHE = "GLIBC_TUNABLES", "glibc.malloc.tcache_count=0"


def keep_freed_memory() -> bool:
    """Of this process, from now on; whether its C library can (glibc does, musl and macOS's do not).

    To be called before the tensors are made that it is for. The cache of small blocks is up to whoever starts the
    process (`malloc_environment`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(
        mallopt(name, value) == 1
        for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, GROWTH_BYTES))
    )


def malloc_environment(given: Mapping[str, str]) -> dict[str, str]:
    """What ranks are started with, for glibc: no cache of small freed blocks. What the user has `given` comes last, and
    so prevails."""
    return {TUNABLES: ":".join([NO_THREAD_CACHE, *filter(None, [given.get(TUNABLES)])])}
