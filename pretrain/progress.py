"""Training as a person watches it: a live bar on a terminal, a plain line now and then elsewhere. On stderr."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0


def counting_bar(unit: str, console: Console) -> Progress:
    """A bar of things that are counted, with room for `figures` on the last of them."""
    return Progress(
        TextColumn(unit),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
        expand=True,
        disable=not console.is_terminal,
        redirect_stdout=False,  # a rank's stdout is its log
    )


def validation_in_words(by_source: Mapping[str, Mapping[str, Any]]) -> str:
    """The measures of each held-out source, as an "evaluation" event has them, on one line."""
    return ", ".join(
        f"{name} {measures['loss']:.4f} ({measures['bits_per_byte']:.4f} bits/byte)"
        for name, measures in by_source.items()
    )


class StepProgress:
    """Shows loss, learning rate, tokens/s, MFU and the time that is left."""

    def __init__(
        self, first_step: int, total_steps: int | None, total_tokens: int | None, console: Console | None = None
    ) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.first, self.total_steps, self.total_tokens = first_step, total_steps, total_tokens
        self.first_done = self.last_line = time.monotonic()
        self.bar: Progress | None = None
        if self.console.is_terminal:
            self.bar = counting_bar("step", self.console)
            self.task = self.bar.add_task("train", total=total_steps, completed=first_step, figures="starting")
            self.bar.start()

    def step(self, event: dict[str, Any]) -> None:
        """After each step."""
        figures = (
            f"loss {event['loss']:.4f}  lr {event['lr']:.2e}  {event['tokens_per_second']:,.0f} tok/s  "
            f"MFU {event['mfu']:.1%}"
        )
        total = self._total_steps(event)
        if event["step"] <= self.first + 1:
            self.first_done = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=event["step"], total=total, figures=figures)
        elif self._line_is_due(event["step"], total):
            left = self._time_left(event["step"], total)
            self.say(f"step {event['step']}/{total}  {figures}  grad norm {event['grad_norm']:.3f}{left}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()

    def _total_steps(self, event: dict[str, Any]) -> int:
        """The length of the run in steps; of a run counted in tokens, at this step's batch size."""
        if self.total_steps is not None:
            return self.total_steps
        assert self.total_tokens is not None
        left = max(0, self.total_tokens - event["tokens"])
        return event["step"] + -(-left // max(1, event["tokens_in_step"]))

    def _time_left(self, step: int, total: int) -> str:
        """At the pace of the steps after the first one, which finds memory and compiles; after it nothing is known."""
        steps = step - self.first - 1
        return f"  {(time.monotonic() - self.first_done) / steps * (total - step):,.0f} s left" if steps > 0 else ""

    def _line_is_due(self, step: int, total: int) -> bool:
        now = time.monotonic()
        due = step in (self.first + 1, total) or now - self.last_line >= PLAIN_SECONDS
        if due:
            self.last_line = now
        return due
