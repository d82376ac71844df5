"""What a run ran on: versions, revision, host, devices. Recorded, since an upgrade can change what is learned."""

import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pretrain.device import device_name
from pretrain.run_dir import read_json

PACKAGES = ("steppe", "torch", "deepspeed", "accelerate", "datasets", "sentencepiece", "numpy", "safetensors")


def describe_environment(device: torch.device, world: int) -> dict[str, Any]:
    """JSON values; `git` is None where the code does not lie in a git checkout."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git(),
        "host": socket.gethostname(),
        "ranks": world,
        "device": device_name(device),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    root = Path(__file__).parent.parent
    frozen = root.with_name("code.json")  # beside a run's copy of the code, see `launch/cluster/freeze.py`
    if root.name == "code" and frozen.is_file():
        return {key: value for key, value in read_json(frozen).items() if key in ("revision", "dirty")}

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        # A wheel may be installed inside somebody else's checkout: its revision is not ours.
        if not (root / ".git").exists():
            return None
        return {"revision": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
