"""How far an evaluation is, on stderr: a live line on a terminal, a plain one now and then elsewhere."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pretrain.evaluation.evaluate import Score

PLAIN_SECONDS = 30.0


class ProgressDisplay:
    """Documents, tokens/s and, where the size of the corpus is known, the time left.

    The ranks are dealt equal shares, so what one has scored stands for all: its counts are shown times `world`.
    total_bytes: raw text of the corpus, None if unknown. shown: False on all ranks but one.
    """

    def __init__(
        self, total_bytes: int | None, world: int, shown: bool = True, plain_seconds: float = PLAIN_SECONDS
    ) -> None:
        self.total_bytes, self.world, self.shown, self.plain_seconds = total_bytes, world, shown, plain_seconds
        self.started = self.printed = time.monotonic()
        self.live: Progress | None = None
        if shown and sys.stderr.isatty():
            columns = (
                BarColumn(),
                TextColumn("{task.fields[line]}"),
                *([TimeRemainingColumn()] if total_bytes else []),
            )
            self.live = Progress(*columns, console=Console(stderr=True), transient=True)
            self.task = self.live.add_task("", total=total_bytes, line="")

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()

    def update(self, so_far: Score) -> None:
        """Take in what this rank has scored since the start."""
        now = time.monotonic()
        elapsed = max(now - self.started, 1e-9)
        done_bytes = so_far.bytes * self.world
        line = f"{so_far.documents * self.world:,} documents, {so_far.tokens * self.world / elapsed:,.0f} tokens/s"
        if self.live:
            self.live.update(self.task, completed=done_bytes, line=line)
        elif self.shown and now - self.printed >= self.plain_seconds:
            self.printed = now
            left = ""
            if self.total_bytes and done_bytes:
                seconds = elapsed * max(0.0, self.total_bytes / done_bytes - 1)
                left = f", {min(1.0, done_bytes / self.total_bytes):.0%} of the text, about {seconds:,.0f} s left"
            print(f"eval: {line}{left}", file=sys.stderr, flush=True)
