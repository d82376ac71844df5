"""Being asked for something: a signal only sets a flag, a file only lies there; the ranks see both together at the end
of a step."""

import ctypes
import os
import signal
import time
from pathlib import Path
from types import FrameType

from pretrain.run_dir import RunDir

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAUNCHER = "STEPPE_LAUNCHER"  # the launcher's process id, for the ranks that it starts


def launcher() -> int:
    """The launcher's process id. A rank whose launcher has died already has another parent by now."""
    return int(os.environ.get(LAUNCHER, os.getppid()))


def when_launcher_dies(number: signal.Signals, launcher: int) -> None:
    """Have the kernel send this process a signal then."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != launcher:  # it died just before the kernel was told
        os.kill(os.getpid(), number)


class StopRequest:
    """SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (a job near its time limit) ask for: finish the step, checkpoint, end with
    exit code 75.

    The death of the launcher asks for the same, by a SIGTERM from the kernel: no rank trains on unseen. But before
    `begin` it ends the rank at once: there is nothing to save yet, and ranks that meet through an address which is gone
    would wait for half an hour.
    """

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._ask)
        self._launcher = launcher()
        when_launcher_dies(signal.SIGKILL, self._launcher)

    def begin(self) -> None:
        """From here on there is something to save."""
        when_launcher_dies(signal.SIGTERM, self._launcher)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


class Switches:
    """The files `stop` and `save` in a run's folder: checkpoint and end, and checkpoint now. The first rank's alone."""

    EVERY_SECONDS = 2.0  # a network file system has better to do than to be asked at each step

    def __init__(self, run_dir: RunDir, rank: int) -> None:
        self._stop, self._save = run_dir.stop_path, run_dir.save_path
        self._paths = [self._stop, self._save] if rank == 0 else []
        self._next_look = 0.0
        self._seen: list[Path] = []

    def look(self) -> tuple[bool, bool]:
        """Whether to stop, and whether to save."""
        if self._paths and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + self.EVERY_SECONDS
            self._seen = [path for path in self._paths if os.path.exists(path)]  # no error ends a run here
        return self._stop in self._seen, self._save in self._seen

    def saving(self) -> None:
        """A checkpoint is under way: the wish for one is met. `stop` stays: whoever starts ranks again heeds it."""
        for path in self._seen:
            if path == self._save:
                path.unlink(missing_ok=True)
        self._seen = [path for path in self._seen if path != self._save]
