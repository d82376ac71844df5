"""Being asked to stop: a signal only sets a flag, which the ranks see together at the end of a step."""

import ctypes
import os
import signal
from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAUNCHER = "STEPPE_LAUNCHER"  # the launcher's process id, for the ranks that it starts


class StopRequest:
    """SIGTERM and SIGINT (Ctrl-C) ask for: finish the step, checkpoint, end with exit code 75.

    The death of the launcher asks for the same, by a SIGTERM from the kernel: no rank trains on unseen. But before
    `begin` it ends the rank at once: there is nothing to save yet, and ranks that meet through an address which is gone
    would wait for half an hour.
    """

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        # A rank whose launcher died before this line has another parent by now.
        self._launcher = int(os.environ.get(LAUNCHER, os.getppid()))
        self._when_launcher_dies(signal.SIGKILL)

    def begin(self) -> None:
        """From here on there is something to save."""
        self._when_launcher_dies(signal.SIGTERM)

    def _when_launcher_dies(self, number: signal.Signals) -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != self._launcher:  # it died just before the kernel was told
            os.kill(os.getpid(), number)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
