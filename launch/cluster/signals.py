"""Signals in a job: what the supervisor is told by Slurm, and how it tells the ranks."""

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch.cluster.rank import pid_path
from pretrain.run_dir import RunDir


@dataclass
class Told:
    """What signals have said: when USR1 came (Slurm: the limit is near), and whether TERM did (it is over)."""

    usr1_at: float | None = None
    term: bool = False

    def listen(self) -> None:
        """From now on signals are only noted."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self.term = True
        elif self.usr1_at is None:
            self.usr1_at = time.time()


def ask_rank_0(run: RunDir) -> None:
    """Send USR1 to rank 0, if it listens; the ranks see it together. It is on this node: ranks are numbered node by
    node, and the batch script runs on the first.

    To rank 0 alone: Slurm would deliver a signal to whatever ranks have started, too, and so end the processes (such as
    compilers) that do not know it. A rank that does not listen yet would be ended as well: it is asked again later.
    """
    try:
        pid = int(pid_path(run).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return  # it is about to start
    if catches(pid, signal.SIGUSR1):
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGUSR1)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process of this machine handles a signal; one that does not may be ended by it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return False
    mask = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)
