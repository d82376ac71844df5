"""When a job asks its ranks to stop, and until when it waits for them. Pure."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# For a signal to arrive, ranks to end and Slurm to take a requeue.
SETTLE_SECONDS = 30.0
# Before the time limit: ranks that have not ended by then are killed, so that the requeue still comes in time.
KILL_SECONDS = 10.0
# Slurm may send its signal so much earlier than it was told to (man sbatch, --signal).
SLURM_EARLY_SECONDS = 90.0
RECENT = 100


@dataclass(frozen=True)
class Pace:
    """Seconds that the slowest of the recent steps, saves and validations have taken; None where none was measured."""

    step_seconds: float | None = None
    save_seconds: float | None = None
    validation_seconds: float | None = None

    def lead_seconds(self, told_seconds: float) -> float:
        """How long before the limit ranks must be asked to stop. They may just have begun a validation, after which
        comes a whole step; then a save waits for one that is under way.

        told_seconds: what is at least taken until a step and a save have been measured.
        """
        step, save = self.step_seconds, self.save_seconds
        measured = (self.validation_seconds or 0.0) + 2 * (step or 0.0) + 2 * (save or 0.0) + SETTLE_SECONDS
        return max(told_seconds, measured) if step is None or save is None else measured


class Stopwatch:
    """What recent steps, saves and validations have taken, from the events of a run.

    The first step of an attempt is left out: it compiles and allocates.
    """

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._saves: deque[float] = deque(maxlen=RECENT)
        self._validations: deque[float] = deque(maxlen=RECENT)
        self._first = True

    def see(self, events: Iterable[dict[str, Any]]) -> Pace:
        """The pace after some more events, oldest first."""
        for event in events:
            match event["type"]:
                case "start":
                    self._first = True
                case "step" if self._first:
                    self._first = False
                case "step":
                    self._steps.append(event["step_seconds"])
                case "checkpoint":
                    self._saves.append(event["stall_seconds"] + event["seconds"])
                case "evaluation":
                    self._validations.append(event["seconds"])
        return Pace(*(max(seconds, default=None) for seconds in (self._steps, self._saves, self._validations)))


@dataclass(frozen=True)
class Clock:
    """One attempt's times, in epoch seconds.

    begin: when the attempt began. end: the job's limit, None if it has none or Slurm has not said. told_seconds: how
    long before the limit Slurm was asked to send USR1. pace: as far as it was measured.
    """

    begin: float
    end: float | None
    told_seconds: float
    pace: Pace = Pace()

    @property
    def lead_seconds(self) -> float:
        """How long before the limit ranks are to be asked to stop."""
        return self.pace.lead_seconds(self.told_seconds)

    @property
    def stop_at(self) -> float | None:
        """When ranks are to be asked to stop. Half of the job's time is for training whatever a step takes."""
        if self.end is None:
            return None
        return self.end - min(self.lead_seconds, (self.end - self.begin) / 2)

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
        return asked_at + max(self.told_seconds - KILL_SECONDS, self.pace.lead_seconds(0.0))
