"""Histories of runs that never were: events as a run writes them, and the truth about every second of it."""

import json
from typing import Any

from launch.goodput import ACCOUNTS
from pretrain.run_dir import RunDir


class MadeUpRun:
    """Keeps a clock. Each method lets something happen: it moves the clock, writes what a run would write, and notes
    which account each second belongs to."""

    def __init__(self, cluster: bool, now: float = 1000.0) -> None:
        self.cluster, self.now, self.began = cluster, now, now
        self.events: list[dict[str, Any]] = []
        self.truth = dict.fromkeys(ACCOUNTS, 0.0)
        self.steps: list[tuple[int, float, str]] = []  # number, seconds, account
        self.step = self.restart = 0
        self._save: tuple[int, float] | None = None  # under way: step, how long it held training up

    def passes(self, account: str, seconds: float) -> None:
        self.now += seconds
        self.truth[account] += seconds

    def write(self, kind: str, **fields: Any) -> None:
        self.events.append({"type": kind, "time": self.now, **fields})

    def submitted(self, waits: float, why: str = "submit") -> None:
        self.write("submitted", job_id="7", nodes=1, ranks=2, cluster="here", why=why)
        self.passes("queued", waits)

    def attempt(self, step: int, starts: float, checks: float = 0.0, bad: dict[str, str] | None = None) -> None:
        """Begins, and goes on from `step` if the nodes are good. A local run's first sign is its environment."""
        if self.cluster:
            names = {"job_id": "7", "restart": self.restart, "array_task": None, "nodes": ["n1"], "ranks": 2}
            self.write("attempt", **names, checkpoint=step)
            self.restart += 1
            self.passes("starting", starts / 2)
            self.passes("preflight", checks)
            self.write("preflight", seconds=checks, bad=bad or {})
        if not bad:
            self.write("environment", host="n1", ranks=2)
            self.passes("starting", starts / 2)
            self.write("start", step=step, ranks=2)
            self.back_to(step)
            self.passes("starting", starts / 4)

    def back_to(self, step: int) -> None:
        while self.steps and self.steps[-1][0] > step:
            _, seconds, account = self.steps.pop()
            self.truth[account] -= seconds
            self.truth["again"] += seconds
        self.step = step

    def makes_step(
        self,
        seconds: float,
        waits: float = 0.0,
        staging: float = 0.0,
        skipped: bool = False,
        reports: bool = True,
        **numbers: Any,
    ) -> None:
        """staging: how long the save of the step before holds this one up. reports: a save under way is over."""
        self.step += 1
        account = "skipped" if skipped else "useful"
        if self._save is not None and self._save[0] == self.step - 1:
            self._save = (self._save[0], self._save[1] + staging)
            self.passes("saves", staging)
        else:
            staging = 0.0
        self.passes("data", waits)
        self.passes(account, seconds)
        self.steps.append((self.step, seconds, account))
        times = {"step_seconds": seconds + waits + staging, "data_seconds": waits}
        speed = {"tokens_per_second": 10 / max(1e-9, seconds + waits + staging), "mfu": 0.4}
        about = {"loss": 2 + 8 / self.step, "grad_norm": 1.0, "lr": 1e-3} | speed | times | numbers
        self.write("step", step=self.step, tokens=self.step * 10, skipped=skipped, **about)
        if reports:
            self.reports()

    def starts_save(self, stall: float) -> None:
        """`stall` is what the save before takes to be over, or all of it if it is synchronous."""
        self.passes("saves", stall)
        self.reports()
        self._save = (self.step, stall)

    def validates(self, seconds: float) -> None:
        self.passes("validation", seconds)
        by_source = {"a": {"loss": 2 + 9 / max(1, self.step), "bits_per_byte": 1.25}}
        self.write("evaluation", step=self.step, tokens=0, by_source=by_source, seconds=seconds)

    def rewinds(self, to_step: int, seconds: float) -> None:
        self.reports()
        self.passes("again", seconds / 3)
        self.write("rewind", step=self.step, to_step=to_step, checkpoint="", left_out=[0, 1], zscore=9.0)
        self.back_to(to_step)
        self.passes("again", seconds - seconds / 3)

    def ends(self, status: str, saves: float, stops: float) -> None:
        """In order: with a last save, whose end training waits for."""
        self.reports()
        self._save = (self.step, 0.0)
        self.passes("saves", saves)
        self.reports()
        self.passes("stopping", stops)
        self.write("end", step=self.step, status=status, message="")

    def verdict(self, status: str, action: str, after: float, account: str) -> None:
        """The supervisor's, `after` seconds, which are the account's."""
        self.passes(account, after)
        outcome = {"status": status, "exit_code": 0, "step": self.step, "message": "said"}
        self.write("attempt_end", outcome=outcome, action=action, why="")

    def write_to(self, run: RunDir) -> None:
        """The files as a run leaves them."""
        of_the_supervisor = ("submitted", "attempt", "preflight", "signal", "attempt_end")
        for path, theirs in ((run.attempts_path, True), (run.events_path, False)):
            lines = [
                json.dumps(event) + "\n" for event in self.events if (event["type"] in of_the_supervisor) == theirs
            ]
            if lines:
                path.write_text("".join(lines))

    def reports(self) -> None:
        """The save under way, if there is one, is over."""
        if self._save is not None:
            step, stall = self._save
            self._save = None
            self.write("checkpoint", step=step, path="", size_bytes=1, stall_seconds=stall, seconds=stall + 1)
