"""How many bytes a command has worked through, on stderr: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

PLAIN_SECONDS = 10.0


class ByteProgress:
    """A context in which a command tells how far it is. `total_bytes` is None where nobody knows."""

    def __init__(self, label: str, total_bytes: int | None) -> None:
        self._label = label
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._started = self._printed = time.monotonic()
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(label, total=total_bytes)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """So many bytes more are done."""
        self.reach(self._done_bytes + count)

    def reach(self, done_bytes: int) -> None:
        """So many bytes are done."""
        self._done_bytes = done_bytes
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=done_bytes)
        elif now - self._printed >= PLAIN_SECONDS:
            self._printed = now
            print(self._plain_line(now - self._started), file=sys.stderr, flush=True)

    def _plain_line(self, elapsed: float) -> str:
        speed = self._done_bytes / elapsed
        line = f"{self._label}: {self._done_bytes / 1e6:,.0f} MB at {speed / 1e6:,.1f} MB/s"
        if not self._total_bytes or not self._done_bytes:
            return line
        seconds_left = max(0, self._total_bytes - self._done_bytes) / speed
        return f"{line}, {self._done_bytes / self._total_bytes:.0%}, about {seconds_left:,.0f} s left"
