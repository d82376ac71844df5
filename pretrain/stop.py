"""Being asked to stop: a signal only sets a flag, which the ranks see together at the end of a step."""

import ctypes
import os
import signal
from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopRequest:
    """SIGTERM and SIGINT (Ctrl-C) ask for: finish the step, checkpoint, end with exit code 75.

    The death of the launcher asks for the same, by a SIGTERM from the kernel: no rank trains on unseen.
    """

    def __init__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        self.asked = os.getppid() != launcher  # it died just before the kernel was told

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
