"""Freed memory is used again: seen in processes of their own."""

import os
import subprocess
import sys

import pytest

from pretrain.host_memory import malloc_environment

FAULTS = """
import ctypes, resource, sys
PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # a huge page would be one fault instead of 512
if sys.argv[1] == "keep":
    from pretrain.host_memory import keep_freed_memory
    assert keep_freed_memory()
import torch
faults = []
for _ in range(24):
    torch.ones(10 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-5])
"""


@pytest.mark.parametrize(("how", "least", "most"), [("keep", 0, 200), ("default", 4 * 10_000, 10**9)])
def test_freed_memory_is_not_faulted_in_again(how: str, least: int, most: int) -> None:
    """Four times 40 MiB, of 4 KiB pages, once the process has as much as it needs: none of them, or each."""
    done = subprocess.run([sys.executable, "-P", "-c", FAULTS, how], capture_output=True, text=True, check=True)
    assert least <= int(done.stdout) <= most


HEAP = """
import ctypes
from pretrain.host_memory import keep_freed_memory
assert keep_freed_memory()
import torch
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
large = torch.empty(3 << 30, dtype=torch.uint8)  # not touched, so no memory is taken for it
end = libc.sbrk(0)
del large
assert libc.sbrk(0) == end
"""


def test_nor_are_gigabytes_given_back() -> None:
    """Where the heap ends does not change: mallopt counts in an int, whose largest number is no more than 2 GiB."""
    subprocess.run([sys.executable, "-P", "-c", HEAP], check=True)


NEIGHBOURS = """
import ctypes
from pretrain.host_memory import keep_freed_memory
assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
LARGE = 64 << 20
first = libc.malloc(LARGE)
for _ in range(10_000):  # the first ones have holes to fill
    if (small := libc.malloc(1000)) == first + LARGE + 16:
        break
else:
    raise SystemExit("no block lies beside the first")
second, end = libc.malloc(LARGE), libc.malloc(1000)
for block in (first, small, second):
    libc.free(block)
print(libc.malloc(2 * LARGE) == first)
"""


@pytest.mark.parametrize(
    ("environment", "joined"),
    [
        ({}, False),
        (malloc_environment({}), True),
        (malloc_environment({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}), True),
        (malloc_environment({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}), False),
    ],
)
def test_blocks_freed_side_by_side_become_one(environment: dict[str, str], joined: bool) -> None:
    """With what ranks are started with, a small one between two large ones too; unless the user says otherwise."""
    outside = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", NEIGHBOURS],
        env=outside | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == str(joined)
