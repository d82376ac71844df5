"""How far an evaluation is, on stderr: a live line on a terminal, a plain one now and then elsewhere."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pretrain.evaluation.evaluate import Scored

PLAIN_SECONDS = 30.0


class ProgressDisplay:
    """Documents, tokens/s and, where the size of the corpus is known, the share that is done and the time left.

    The ranks are dealt equal shares, so what one has scored stands for all: its counts are shown times `world`.
    total_bytes: raw text of the corpus, None if unknown. done_bytes: what earlier sittings have scored of it.
    shown: False on all ranks but one.
    """

    def __init__(
        self,
        total_bytes: int | None,
        done_bytes: int,
        world: int,
        shown: bool = True,
        plain_seconds: float = PLAIN_SECONDS,
    ) -> None:
        self.total_bytes, self.done_bytes, self.world = total_bytes, done_bytes, world
        self.shown, self.plain_seconds = shown, plain_seconds
        self.started = self.printed = time.monotonic()
        self.live: Progress | None = None
        if shown and sys.stderr.isatty():
            columns = (
                BarColumn(),
                TextColumn("{task.fields[line]}"),
                *([TimeRemainingColumn()] if total_bytes else []),
            )
            self.live = Progress(*columns, console=Console(stderr=True), transient=True)
            self.task = self.live.add_task("", total=total_bytes, completed=done_bytes, line="")

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()

    def update(self, so_far: Scored) -> None:
        """Take in what this rank has scored since the sitting began."""
        now = time.monotonic()
        if self.live is None and (not self.shown or now - self.printed < self.plain_seconds):
            return
        elapsed = max(now - self.started, 1e-9)
        new_bytes = so_far.bytes * self.world
        line = f"{so_far.documents * self.world:,} documents, {so_far.tokens * self.world / elapsed:,.0f} tokens/s"
        if self.live:
            self.live.update(self.task, completed=self.done_bytes + new_bytes, line=line)
            return
        self.printed = now
        left = ""
        if self.total_bytes and new_bytes:
            done_bytes = min(self.done_bytes + new_bytes, self.total_bytes)
            seconds = elapsed * (self.total_bytes - done_bytes) / new_bytes
            left = f", {done_bytes / self.total_bytes:.0%} of the text, about {seconds:,.0f} s left"
        print(f"eval: {line}{left}", file=sys.stderr, flush=True)
