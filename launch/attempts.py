"""The attempts at a run: what is known of each, and why it ended, in words. Pure."""

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass
class Attempt:
    """One time that the run was started. Times are epoch seconds; `end` is None where nobody saw it.

    recorded: in attempts.jsonl, and not only told by what its ranks wrote. first_step: of the checkpoint that it went
    on from. status: as in `pretrain.outcome.Outcome`, once known. action, why: the supervisor's verdict. bad_nodes:
    name -> reason. signals: names, as they came. died: another began, or was asked for, before it said how it ended.
    """

    begin: float
    recorded: bool
    job_id: str | None = None
    restart: int = 0
    array_task: int | None = None
    nodes: list[str] = field(default_factory=list)
    ranks: int | None = None
    end: float | None = None
    first_step: int = 0
    last_step: int = 0
    status: str | None = None
    message: str = ""
    action: str | None = None
    why: str = ""
    bad_nodes: dict[str, str] = field(default_factory=dict)
    signals: list[str] = field(default_factory=list)
    died: bool = False

    @property
    def open(self) -> bool:
        """Whether it goes on, as far as is known."""
        return self.end is None and not self.died


class Ending(NamedTuple):
    """kind: done, stopped, time limit, preempted, preempted or node lost, cancelled, node lost, bad nodes, failed,
    killed or running."""

    kind: str
    words: str


def endings(attempts: list[Attempt], requeued: bool = False) -> list[Ending]:
    """Why each attempt ended. requeued: Slurm has the last one's job in its queue again."""
    restarted = [
        later.job_id is not None and later.job_id == attempt.job_id and later.restart > attempt.restart
        for attempt, later in itertools.pairwise(attempts)
    ]
    return [ending(attempt, again) for attempt, again in zip(attempts, [*restarted, requeued], strict=False)]


def ending(attempt: Attempt, restarted: bool) -> Ending:
    """Why one ended. restarted: Slurm ran the same job again, or will. A TERM is sent for a preemption and for a
    cancellation alike; only by this they are told apart."""
    saved = {"stopped": "checkpointed", "failed": f"before it could checkpoint: {attempt.message}"}
    if attempt.status == "done":
        return Ending("done", attempt.message)
    if attempt.bad_nodes and attempt.status != "stopped":
        told = "; ".join(f"{name}: {reason}" for name, reason in attempt.bad_nodes.items())
        return Ending("bad nodes", told)
    if "TERM" in attempt.signals and not attempt.open:
        kind = "preempted" if restarted else "cancelled"
        by = "Slurm took its nodes away" if restarted else "cancelled, or at its time limit"
        if restarted and attempt.status != "stopped":  # so it ends, too, where another than its first node has failed
            kind, by = "preempted or node lost", "Slurm took its nodes away, or one of them failed"
        return Ending(kind, f"{by}; {saved.get(attempt.status or '', 'killed before it could checkpoint')}")
    if attempt.status == "stopped":
        if set(attempt.signals) & {"USR1", "time"}:
            return Ending("time limit", f"near its time limit; {saved['stopped']}")
        return Ending("stopped", f"on request; {saved['stopped']}")
    if attempt.status == "failed":
        return Ending("failed", attempt.message)
    if attempt.open:
        return Ending("running", "")
    if attempt.recorded:
        return Ending("node lost", "its first node went away without a word")
    return Ending("killed", "its processes ended without a word")
