"""When a job asks its ranks to stop, and until when it waits for them. Pure, but for reading what steps have taken."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.run_dir import parsed_events

# For a signal to arrive, ranks to end and Slurm to take a requeue.
SETTLE_SECONDS = 30.0
# Before the time limit: ranks that have not ended by then are killed, so that the requeue still comes in time.
KILL_SECONDS = 10.0
# Slurm may send its signal so much earlier than it was told to (man sbatch, --signal).
SLURM_EARLY_SECONDS = 90.0
RECENT_STEPS = 100
TAIL_BYTES = 1 << 19


@dataclass(frozen=True)
class Pace:
    """Seconds that the slowest of the recent steps, saves and validations have taken; 0 where there was none."""

    step_seconds: float = 0.0
    save_seconds: float = 0.0
    validation_seconds: float = 0.0

    @property
    def lead_seconds(self) -> float:
        """How long before the limit ranks must be asked to stop. They may just have begun a validation, after which
        comes a whole step; then a save waits for one that is under way."""
        return self.validation_seconds + 2 * self.step_seconds + 2 * self.save_seconds + SETTLE_SECONDS


def pace(events: Iterable[dict[str, Any]]) -> Pace | None:
    """From the last events of a run, oldest first; None before a second step is on record.

    The first step of an attempt is left out: it compiles and allocates.
    """
    steps: list[float] = []
    saves, validations, last, first = [0.0], [0.0], 0.0, True
    for event in events:
        if event["type"] == "start":
            first = True
        elif event["type"] == "step":
            steps += [] if first else [event["step_seconds"]]
            first = False
        elif event["type"] == "checkpoint":
            saves.append(event["stall_seconds"] + event["seconds"])
        elif event["type"] == "evaluation" and last:
            validations.append(event["time"] - last)  # it comes right after a step
        last = event["time"]
    return Pace(max(steps[-RECENT_STEPS:]), max(saves), max(validations)) if steps else None


def last_events(path: Path) -> list[dict[str, Any]]:
    """The events at the end of a long events.jsonl; none if there is no such file."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        start = max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES)
        file.seek(start)
        return list(parsed_events(file.read().splitlines()[bool(start) :]))  # the first may have lost its beginning


@dataclass(frozen=True)
class Clock:
    """One attempt's times, in epoch seconds.

    begin: when the attempt began. end: the job's limit, None if it has none or Slurm has not said. told_seconds: how
    long before the limit Slurm was asked to send USR1. pace: None until it was measured.
    """

    begin: float
    end: float | None
    told_seconds: float
    pace: Pace | None = None

    @property
    def stop_at(self) -> float | None:
        """When ranks are to be asked to stop. Half of the job's time is for training whatever a step takes."""
        if self.end is None:
            return None
        lead = self.told_seconds if self.pace is None else self.pace.lead_seconds
        return self.end - min(lead, (self.end - self.begin) / 2)

    def stop_is_due(self, now: float, told_at: float | None) -> bool:
        """Whether to ask for the stop. told_at: when USR1 came, None if it has not.

        Slurm's USR1 comes at a time that was guessed at submission, and is noted only, where the limit is known; one
        that comes long before is a person's, who means now.
        """
        if self.end is None or self.stop_at is None:
            return told_at is not None
        meant = told_at is not None and told_at < self.end - self.told_seconds - SLURM_EARLY_SECONDS
        return meant or now >= self.stop_at

    def kill_at(self, asked_at: float) -> float:
        """Until when ranks that were asked to stop may take."""
        if self.end is not None:
            return max(self.end - KILL_SECONDS, asked_at)
        lead = 0.0 if self.pace is None else self.pace.lead_seconds
        return asked_at + max(self.told_seconds - KILL_SECONDS, lead)
