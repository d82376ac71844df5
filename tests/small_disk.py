"""A file system of a few MB, which is soon full."""

import subprocess
from pathlib import Path

from tests.required import lacking


def mount(path: Path, megabytes: int) -> None:
    """Mount one at a new folder. Skips the test where that is not allowed, or fails it (`lacking`): it takes root."""
    path.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        lacking(f"no small file system can be mounted, which takes root: {done.stderr.strip()}")


def unmount(path: Path) -> None:
    subprocess.run(["umount", "--lazy", str(path)], check=True)
