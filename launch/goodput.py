"""Who had a run's wall time, over all its attempts: steps that count, and each cause of loss. Pure, and free of torch.

The clock runs from the submission (of a local run: from its first sign of life) to the end. Every event ends a stretch
of it that goes to one account, so that the accounts add up to the wall time, whatever was recorded and what not.
"""

from array import array
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from typing import Any

from launch.attempts import Attempt

# The accounts, in the order in which they are shown.
ACCOUNTS = {
    "useful": "steps that count",
    "again": "steps lost in a crash or taken back, which are made again",
    "skipped": "steps whose update was left out",
    "data": "waiting for data",
    "validation": "validation",
    "saves": "waiting for a checkpoint",
    "preflight": "checking the nodes",
    "starting": "starting: from an attempt's beginning to its first step",
    "stopping": "stopping: from an attempt's last step to its end",
    "queued": "waiting in the queue",
    "down": "down: from a crash to the next attempt",
    "stopped": "stopped: nobody had asked for it to go on",
}
# The accounts that are phases of an attempt or between two; all others are parts of training.
PHASES = ("preflight", "starting", "stopping", "queued", "down", "stopped")
# How many steps the present speed is taken from.
RECENT_STEPS = 200


@dataclass
class Phase:
    """A stretch of the timeline; kind: one of PHASES, or training."""

    kind: str
    begin: float
    end: float


@dataclass(frozen=True)
class Goodput:
    """Seconds of each account; they add up to `end - begin`.

    Steps: made in all; of them, those that are part of the run as it is now; of these, those without an update.
    """

    begin: float
    end: float
    seconds: dict[str, float]
    steps_made: int
    steps_standing: int
    steps_skipped: int

    @property
    def wall_seconds(self) -> float:
        return self.end - self.begin

    def share(self, account: str) -> float:
        """Of the wall time; 0 where none has passed."""
        return self.seconds[account] / self.wall_seconds if self.wall_seconds > 0 else 0.0

    def in_words(self) -> str:
        """One line: the share of useful steps, and the causes of loss from 0.1 % on, the largest first."""
        lost = sorted((name for name in ACCOUNTS if name != "useful"), key=self.share, reverse=True)
        told = ", ".join(f"{name} {self.share(name):.1%}" for name in lost if self.share(name) >= 0.001)
        return f"{self.share('useful'):.1%} useful" + (f"; {told}" if told else "")

    def as_json(self) -> dict[str, Any]:
        return {
            "wall_seconds": self.wall_seconds,
            "seconds": dict(self.seconds),
            "shares": {name: self.share(name) for name in ACCOUNTS},
            "steps_made": self.steps_made,
            "steps_standing": self.steps_standing,
            "steps_skipped": self.steps_skipped,
        }


class History:
    """What happened, fed with the events of events.jsonl and attempts.jsonl together, in the order of their times.

    attempts, phases: so far. phase: what the run is in since its last event; None before the first. tip: the last step
    event that stands. recent: (time, step, tokens) of the last steps, all of one stretch of training.
    """

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.phases: list[Phase] = []
        self.phase: str | None = None
        self.begin = self.at = 0.0
        self.tip: dict[str, Any] | None = None
        self.recent: deque[tuple[float, int, int]] = deque(maxlen=RECENT_STEPS)
        self._seconds = dict.fromkeys(ACCOUNTS, 0.0)
        self._steps_made = 0
        # The steps that stand, rising: number, seconds of the account that has them, and whether that is `skipped`.
        self._numbers, self._spent, self._skips = array("q"), array("d"), array("b")
        self._pending = 0.0  # seconds since the last step which are not in an account yet
        self._reloading = False  # since a rewind no step was made
        self._environment = False  # the open attempt's ranks have reported
        self._asked_at: float | None = None  # when somebody asked for the open attempt's successor

    def feed(self, event: dict[str, Any]) -> None:
        """Take the next event into account. Clocks of two machines may differ: time never runs backwards here."""
        now = event["time"]
        if self.phase is None:
            self.begin = self.at = now
        act = getattr(self, f"_on_{event['type']}", None)
        if act is not None:
            act(event, max(now, self.at))

    def goodput(self, now: float | None = None) -> Goodput:
        """The accounts up to the last event; or up to now, whose time goes to the present phase. A step under way is
        in none: it is a step once it is made."""
        seconds, end = dict(self._seconds), self.at
        seconds["useful"] += self._pending
        if now is not None and self.phase is not None and self.phase != "training":
            end = max(now, self.at)
            seconds[self.phase] += end - self.at
        seconds = {name: max(0.0, value) for name, value in seconds.items()}  # but for rounding, they are not below
        return Goodput(self.begin, end, seconds, self._steps_made, len(self._numbers), sum(self._skips))

    @property
    def open(self) -> Attempt | None:
        """The attempt that has not ended, as far as is known."""
        last = self.attempts[-1] if self.attempts else None
        return last if last is not None and last.open else None

    # What each event means; `now` is its time.

    def _on_submitted(self, event: dict[str, Any], now: float) -> None:
        if self.open is not None:  # about to end, or dead: what comes next will tell
            self._asked_at = now
            return
        self._spend(self.phase or "queued", now)
        self.phase = "queued"

    def _on_attempt(self, event: dict[str, Any], now: float) -> None:
        known = {name: event[name] for name in ("restart", "array_task", "nodes", "ranks")}
        job_id = None if event["job_id"] is None else str(event["job_id"])
        step = event["checkpoint"]
        self._begin(Attempt(now, recorded=True, job_id=job_id, first_step=step, last_step=step, **known), now)

    def _on_preflight(self, event: dict[str, Any], now: float) -> None:
        self._spend("starting", now - event["seconds"])
        self._spend("preflight", now)
        if self.open is not None:
            self.open.bad_nodes = dict(event["bad"])

    def _on_environment(self, event: dict[str, Any], now: float) -> None:
        if self.open is None or self._environment:
            nodes = [event["host"]] if "host" in event else []
            self._begin(Attempt(begin=now, recorded=False, nodes=nodes, ranks=event.get("ranks")), now)
        self._environment = True

    def _on_start(self, event: dict[str, Any], now: float) -> None:
        if self.open is None:
            self._begin(Attempt(begin=now, recorded=False), now)
        assert self.open is not None
        self.open.first_step = self.open.last_step = event["step"]
        self.open.ranks = event["ranks"]
        self._spend("starting", now)
        self._take_back(event["step"])

    def _on_step(self, event: dict[str, Any], now: float) -> None:
        began = now - event["step_seconds"]
        if self.open is None:  # nothing says when it began
            self._begin(Attempt(begin=began, recorded=False, first_step=event["step"] - 1), began)
        if self.phase != "training" or self._reloading:
            self._spend("again" if self._reloading else "starting", began)
            self.phase, self._reloading = "training", False
        self._take_back(event["step"] - 1)
        seconds = self._pending + now - self.at
        waited = min(event["data_seconds"], seconds)
        self._pending = 0.0
        self._draw("training", now)
        self._seconds["data"] += waited
        self._seconds["skipped" if event["skipped"] else "useful"] += seconds - waited
        self._numbers.append(event["step"])
        self._spent.append(seconds - waited)
        self._skips.append(event["skipped"])
        self._steps_made += 1
        self.attempts[-1].last_step, self.tip = event["step"], event
        self.recent.append((event["time"], event["step"], event["tokens"]))

    def _on_evaluation(self, event: dict[str, Any], now: float) -> None:
        began = now - min(event.get("seconds", now - self.at), now - self.at)
        self._pending += began - self.at  # of the step before and its save; the next event tells
        self._draw("training", began)
        self._spend("validation", now)

    def _on_checkpoint(self, event: dict[str, Any], now: float) -> None:
        """A save held training up after its step; it is reported when it is over, often steps later."""
        place = bisect_right(self._numbers, event["step"])
        if place < len(self._numbers):
            moved = min(event["stall_seconds"], self._spent[place])
            self._spent[place] -= moved
            self._seconds["skipped" if self._skips[place] else "useful"] -= moved
            self._seconds["saves"] += moved
        elif self.phase == "training":  # no step was made meanwhile
            self._settle("saves", now)

    _on_checkpoint_failed = _on_checkpoint

    def _on_rewind(self, event: dict[str, Any], now: float) -> None:
        self._take_back(event["to_step"])
        self._settle("again", now)
        self._reloading = True

    def _on_signal(self, event: dict[str, Any], now: float) -> None:
        if self.open is not None:
            self.open.signals.append(event["name"])

    def _on_end(self, event: dict[str, Any], now: float) -> None:
        self._settle("stopping", now)
        if self.open is not None:
            self.open.status, self.open.message = event["status"], event["message"]
            self.phase = "stopping"
            if not self.open.recorded:
                self.open.end = now
                self.phase = "down" if event["status"] == "failed" else "stopped"

    def _on_attempt_end(self, event: dict[str, Any], now: float) -> None:
        """There is a second one where Slurm did not do what the first says."""
        if not self.attempts:
            return
        outcome, attempt = event["outcome"], self.attempts[-1]
        crashed = outcome["status"] == "failed"
        if attempt.open:
            self._settle("starting" if self.phase == "starting" else "down" if crashed else "stopping", now)
            attempt.end = now
        attempt.status, attempt.message = outcome["status"], outcome["message"]
        attempt.action, attempt.why = event["action"], event["why"]
        goes_on = self._asked_at is not None or event["action"] in ("requeue", "resubmit", "next", "slurm")
        self.phase = "queued" if goes_on else "down" if crashed else "stopped"

    # How time is given out.

    def _begin(self, attempt: Attempt, now: float) -> None:
        self._give_up()
        self._spend(self.phase or "queued", now)
        self.attempts.append(attempt)
        self.phase = "starting"
        self._environment = self._reloading = False
        self._asked_at = None
        self.recent.clear()

    def _give_up(self) -> None:
        """The open attempt is dead, since its last event; after a TERM, Slurm has been asked to run it again."""
        attempt = self.open
        if attempt is not None:
            attempt.died = True
            self.phase = "queued" if "TERM" in attempt.signals else "down"
            self._settle(self.phase, self.at if self._asked_at is None else self._asked_at)
            if self._asked_at is not None:
                self.phase = "queued"

    def _settle(self, account: str, now: float) -> None:
        """No step comes any more: what was held for one goes to the account, too."""
        self._seconds[account] += self._pending
        self._pending = 0.0
        self._spend(account, now)

    def _take_back(self, step: int) -> None:
        """The steps after this one do not count: they are, or will be, made again."""
        if self._numbers and self._numbers[-1] > step:
            self.recent.clear()
        while self._numbers and self._numbers[-1] > step:
            self._numbers.pop()
            spent = self._spent.pop()
            self._seconds["skipped" if self._skips.pop() else "useful"] -= spent
            self._seconds["again"] += spent

    def _spend(self, account: str, until: float) -> None:
        """Give the time since the last event, until then, to an account."""
        self._seconds[account] += max(0.0, until - self.at)
        self._draw(account if account in PHASES else "training", until)

    def _draw(self, phase: str, until: float) -> None:
        """Move the clock, and go on with the timeline."""
        if until <= self.at:
            return
        if self.phases and self.phases[-1].kind == phase:
            self.phases[-1].end = until
        else:
            self.phases.append(Phase(phase, self.at, until))
        self.at = until
