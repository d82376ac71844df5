"""What a run is doing: told by the files in its folder, and by Slurm where it is a job and Slurm answers. No torch."""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.attempts import Attempt, endings
from launch.cluster.record import JobRecord
from launch.cluster.run_state import OVER, has_ended, job_state, local_state
from launch.cluster.slurm import Job, Slurm
from launch.cluster.slurm_view import SlurmView
from launch.feed import Feed
from launch.goodput import Goodput, History
from launch.run_folder import check_run
from pretrain.config import ScheduleConfig
from pretrain.outcome import Outcome
from pretrain.recipe import load_config
from pretrain.run_dir import RunDir

# A person waits for the answer, and the files tell most of it.
SLURM_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands; None is what is not known.

    state: queued, starting, training, stopping, or one of OVER (`launch/cluster/run_state.py`). why: in words.
    notes: what else a person should know. total_steps: None if the run is as long as so many tokens.
    tokens_per_second, eta_seconds: by the speed of the last steps, with all that came between them.
    silent_seconds: since the last thing that the run wrote. attempts: each as `attempt_row` has it.
    """

    run: str
    name: str
    state: str
    why: str
    notes: list[str]
    step: int
    total_steps: int | None
    tokens: int
    total_tokens: int | None
    loss: float | None
    tokens_per_second: float | None
    mfu: float | None
    eta_seconds: float | None
    silent_seconds: float | None
    validation: dict[str, Any] | None
    checkpoint: dict[str, Any] | None
    job_id: str | None
    nodes: list[str]
    attempts: list[dict[str, Any]]
    goodput: Goodput | None

    def as_json(self) -> dict[str, Any]:
        goodput = None if self.goodput is None else self.goodput.as_json()
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, "goodput": goodput}


class WatchedRun:
    """A run under observation: each look reads what is new. `listener` is told every event, too.

    Raises ValueError if the folder is no run.
    """

    def __init__(
        self,
        path: Path,
        slurm: Slurm | None = None,
        listener: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> None:
        self.listener = listener
        self.run = RunDir(path)
        check_run(self.run)
        self.slurm = slurm or Slurm(SLURM_TIMEOUT_SECONDS)
        self.config = load_config(self.run.config_path)
        self.history = History()
        self.latest: dict[str, dict[str, Any]] = {}  # the last event of each type
        self._feed = Feed(self.run)

    @property
    def is_alive(self) -> bool:
        """Whether it trains on this machine, without a scheduler."""
        self._read()
        return is_alive(self.run, self.history)

    @property
    def record(self) -> JobRecord | None:
        """How it was submitted; None if it never was, or goes on without a scheduler since."""
        last = self.history.attempts[-1] if self.history.attempts else None
        if not self.run.job_path.is_file() or (last and not last.recorded and self.history.phase != "queued"):
            return None
        return JobRecord.read(self.run)

    def look(self, slurm: SlurmView | None = None) -> RunStatus:
        """The run as it is now. slurm: what it said of this and other jobs, if it was asked already."""
        self._read()
        record, attempts, view = self.record, list(self.history.attempts), SlurmView()
        stop_asked = self.run.stop_path.exists()
        if record is None:
            alive, outcome = is_alive(self.run, self.history), read_outcome(self.run)
            state, why = local_state(self.history, alive, outcome, stop_asked)
            if attempts and attempts[-1].open and not alive:
                status, message = (None, "") if outcome is None else (outcome.status, outcome.message)
                attempts[-1] = replace(attempts[-1], died=True, status=status, message=message)
        elif record.job_id is None:
            state, why = "stopped", "it was never queued"
        else:
            if not has_ended(self.history):
                view = (slurm or SlurmView.of([record.job_id], self.slurm)).of_job(record.job_id)
            unknown = view.problem is not None
            state, why = job_state(self.history, view.active, view.last_word, unknown, stop_asked)
        return self._status(state, why, view, record, attempts)

    def _read(self) -> None:
        for event in self._feed.new():
            self.history.feed(event)
            self.latest[event["type"]] = event
            self.listener(event)

    def _status(
        self,
        state: str,
        why: str,
        view: SlurmView,
        record: JobRecord | None,
        attempts: list[Attempt],
    ) -> RunStatus:
        tip, job, schedule, now = self.history.tip or {}, view.active, self.config.schedule, time.time()
        goodput = self.history.goodput(now if state in ("queued", "starting") else None)
        seconds_per_step, speed = self._pace() if state in ("training", "stopping") else (None, None)
        silent = now - max(event["time"] for event in self.latest.values()) if self.latest else None
        return RunStatus(
            run=str(self.run.path),
            name=self.config.name,
            state=state,
            why=why,
            notes=self._notes(view, state, silent, seconds_per_step),
            step=tip.get("step", 0),
            total_steps=schedule.total_steps,
            tokens=tip.get("tokens", 0),
            total_tokens=schedule.total_tokens,
            loss=tip.get("loss"),
            tokens_per_second=speed if speed is not None else tip.get("tokens_per_second"),
            mfu=tip.get("mfu"),
            eta_seconds=eta(schedule, tip, seconds_per_step, speed) if state == "training" else None,
            silent_seconds=silent,
            validation=self._validation(),
            checkpoint=self._checkpoint(now),
            job_id=job.job_id if job is not None else record.job_id if record is not None else None,
            nodes=self._nodes(job, attempts),
            attempts=attempt_rows(attempts, requeued=job is not None and job.state == "PENDING"),
            goodput=goodput if self.history.phase is not None else None,
        )

    def _pace(self) -> tuple[float | None, float | None]:
        """Seconds a step and tokens a second, by the clock, over the last steps; None before two are made."""
        recent = self.history.recent
        if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
            return None, None
        (began, first, before), (ended, last, after) = recent[0], recent[-1]
        return (ended - began) / (last - first), (after - before) / (ended - began)

    def _notes(self, view: SlurmView, state: str, silent: float | None, seconds_per_step: float | None) -> list[str]:
        notes = []
        if view.problem is not None:
            notes.append(f"Slurm does not answer, so this is what the files say: {view.problem}")
        patience = max(300.0, 20 * (seconds_per_step or 0.0))
        if state in ("starting", "training", "stopping") and silent is not None and silent > patience:
            notes.append(f"nothing was written for {silent:,.0f} s")
        if state not in OVER:
            notes += [
                f"the file {path.name} asks for it"
                for path in (self.run.stop_path, self.run.save_path)
                if path.exists()
            ]
        for kind in ("disk_low", "straggler", "replicas_differ", "checkpoint_failed"):
            event = self.latest.get(kind)
            if event is not None and event["time"] >= self.history.attempts[-1].begin:
                notes.append(in_words(event))
        return notes

    def _validation(self) -> dict[str, Any] | None:
        event = self.latest.get("evaluation")
        return None if event is None else {"step": event["step"], "by_source": event["by_source"]}

    def _checkpoint(self, now: float) -> dict[str, Any] | None:
        event = self.latest.get("checkpoint")
        if event is None:
            return None
        return {"step": event["step"], "path": event["path"], "age_seconds": now - event["time"]}

    def _nodes(self, job: Job | None, attempts: list[Attempt]) -> list[str]:
        """By name, of the attempt that is under way; in Slurm's short form before that has said so."""
        if attempts and attempts[-1].open:
            return attempts[-1].nodes
        return [job.node_list] if job is not None and job.node_list else []


def eta(
    schedule: ScheduleConfig, tip: dict[str, Any], seconds_per_step: float | None, tokens_per_second: float | None
) -> float | None:
    """Seconds that are left at this speed; None where it is not known."""
    if not seconds_per_step or not tokens_per_second:
        return None
    if schedule.total_steps is not None:
        return max(0, schedule.total_steps - tip["step"]) * seconds_per_step
    return max(0, schedule.total - tip["tokens"]) / tokens_per_second


def attempt_rows(attempts: list[Attempt], requeued: bool) -> list[dict[str, Any]]:
    """Each attempt as JSON values, with why it ended, and what the supervisor made of that (action, verdict).

    requeued: Slurm has the last one's job in its queue again.
    """
    names = ("begin", "end", "job_id", "restart", "array_task", "nodes", "ranks", "first_step", "last_step", "action")
    return [
        {
            **{name: getattr(attempt, name) for name in names},
            "ended": ended.kind,
            "why": ended.words,
            "verdict": attempt.why,
        }
        for attempt, ended in zip(attempts, endings(attempts, requeued), strict=True)
    ]


def in_words(event: dict[str, Any]) -> str:
    """A warning of the run's, as one line."""
    match event["type"]:
        case "disk_low":
            free, needed = event["free_bytes"] / 1e9, event["needed_bytes"] / 1e9
            return f"the disk is nearly full: {free:,.1f} GB are free, the next checkpoints need {needed:,.1f} GB"
        case "straggler":
            late = f"rank {event['rank']} on {event['host']}"
            return f"step {event['step']}: {late} takes {event['ratio']:.1f} times as long as the others"
        case "replicas_differ":
            return f"step {event['step']}: replicas differ on ranks {event['ranks']}"
        case _:
            return f"step {event['step']}: {event['message']}"


def read_outcome(run: RunDir) -> Outcome | None:
    """How the last local attempt ended, None while one goes on, or if it was killed."""
    return Outcome.read(run) if run.outcome_path.is_file() else None


def is_alive(run: RunDir, history: History) -> bool:
    """Whether a local run's launcher or ranks are there: they hold its locks. Looking must not take a lock, not even
    for a moment, since a start at that moment would be refused; so the kernel's list is read.

    A run on another machine is taken for alive while it has written something in the last minutes.
    """
    nodes = history.attempts[-1].nodes if history.attempts else []
    if nodes and nodes[0] != socket.gethostname():
        return history.open is not None and time.time() - history.at < 600
    held = {line.split()[-3].split(":")[-1] for line in Path("/proc/locks").read_text().splitlines()}
    locks = [path for path in (run.lock_path, run.ranks_lock_path) if path.exists()]
    return any(str(os.stat(path).st_ino) in held for path in locks)
