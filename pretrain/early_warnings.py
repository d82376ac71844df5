"""What does not end a run, but had better be known early: slow ranks, and a disk that fills up."""

from contextlib import suppress
from dataclasses import asdict

import torch.distributed as dist

from pretrain.config import RunConfig
from pretrain.low_disk import DiskWatch
from pretrain.recorder import Recorder
from pretrain.run_dir import RunDir
from pretrain.schedule import due
from pretrain.stragglers import Stragglers


class EarlyWarnings:
    """Looks at each step, and tells the recorder. group: of all ranks, on the host; None on a single one."""

    def __init__(
        self, run_dir: RunDir, config: RunConfig, rank: int, group: dist.ProcessGroup | None, recorder: Recorder
    ) -> None:
        self.config, self.recorder = config, recorder
        self.stragglers = Stragglers(config.health, group)
        self.disk = DiskWatch(run_dir.checkpoints, config) if rank == 0 else None
        self._first = True

    def after_step(self, step: int, forward_seconds: float) -> None:
        """forward_seconds: of this rank's first forward pass. Collective."""
        for slow in self.stragglers.after_step(step, forward_seconds):
            self.recorder.event("straggler", str(slow), step=step, **asdict(slow))
        if self.disk is not None and (self._first or due(self.config.checkpoint.every_steps, step)):
            with suppress(OSError):  # a file system that does not answer just now: the next look may tell
                self._look_at_disk(self.disk, step)
        self._first = False

    def _look_at_disk(self, disk: DiskWatch, step: int) -> None:
        low = disk.look(step)
        if low is not None:
            sizes = {"free_bytes": low.free_bytes, "needed_bytes": low.needed_bytes}
            self.recorder.event("disk_low", str(low), step=step, **sizes)
