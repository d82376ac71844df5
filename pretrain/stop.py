"""Being asked to stop: a signal only sets a flag, which the ranks see together at the end of a step."""

import signal
from types import FrameType


class StopRequest:
    """SIGTERM and SIGINT (Ctrl-C) ask for: finish the step, checkpoint, end with exit code 75."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
