"""Freed memory is used again: counted in page faults, in a process of its own."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
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
