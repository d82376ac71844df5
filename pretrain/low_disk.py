"""Whether the next checkpoints will find room: what is free, and what they will take."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from model.parameters import parameter_shapes
from pretrain.checkpoint.folder import kept_steps, list_checkpoints, step_of
from pretrain.config import CheckpointConfig, RunConfig
from pretrain.optimizers import STATE_KINDS, algorithm_of

FP32 = 4


@dataclass(frozen=True)
class DiskLow:
    """Less is free than the next saves need."""

    folder: Path
    free_bytes: int
    needed_bytes: int

    def __str__(self) -> str:
        return (
            f"the disk of {self.folder} is nearly full: {in_units(self.free_bytes)} are free, and the next checkpoints "
            f"need {in_units(self.needed_bytes)}; make room, or keep fewer (checkpoint.keep)"
        )


def checkpoint_bytes(config: RunConfig) -> int:
    """What a checkpoint takes but for its headers: masters and optimizer state, in fp32 whatever the precision is."""
    return FP32 * sum(
        prod(shape) * (1 + len(STATE_KINDS[algorithm_of(name, len(shape), config.optimizer)]))
        for name, shape in parameter_shapes(config.model).items()
    )


def needed_bytes(size_bytes: int, steps: Sequence[int], step: int, config: CheckpointConfig) -> int:
    """What the next `keep` + 1 saves need at the most beyond what the checkpoints that are there take.

    size_bytes: of one. steps: of those that are there, rising. step: the present one.
    A save needs room before anything is removed. After so many saves nothing new can come, but for what stays for good.
    """
    best = steps[0] if config.keep_best and steps else None  # what takes most room: that it never gets better
    there, most = list(steps), len(steps)
    every = config.every_steps
    saves = range(step - step % every + every, step + every * (config.keep + 1) + 1, every) if every else [step + 1]
    for save in saves:
        there = sorted({*there, save})
        most = max(most, len(there))
        there = sorted(kept_steps(there, config, best))
    return size_bytes * (most - len(steps))


class DiskWatch:
    """Looks at the disk of a run's checkpoints; says that it is nearly full once, until it is better.

    What a quota of a parallel file system leaves is not seen here: only the disk's own free space is.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config, self.size_bytes = folder, config.checkpoint, checkpoint_bytes(config)
        self._low = False

    def look(self, step: int) -> DiskLow | None:
        """What is to be said now, after this step, if anything."""
        free = free_bytes(self.folder)
        steps = [step_of(path) for path in list_checkpoints(self.folder)]
        needed = needed_bytes(self.size_bytes, steps, step, self.config)
        known, self._low = self._low, free < needed
        return DiskLow(self.folder, free, needed) if self._low and not known else None


def free_bytes(folder: Path) -> int:
    """What this process may still write to a folder's disk; the folder need not be there yet."""
    while not folder.exists():
        folder = folder.parent
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def in_units(size_bytes: int) -> str:
    """Such as 3.2 GB."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
