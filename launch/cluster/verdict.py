"""What a job does when its ranks are through: requeue itself, make way for the next, or stop. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress
from typing import Any, Literal

from pretrain.outcome import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_WRONG_INPUT, Outcome

# USR1: Slurm says that the time limit is near. time: so does the supervisor's own clock. TERM: cancelled or preempted.
Signal = Literal["USR1", "time", "TERM"]
# done, stop: the run is over, for now. requeue, resubmit (to other nodes), next (of a chained array): it goes on by
# what the job does. slurm: whether it goes on is Slurm's affair.
Action = Literal["done", "requeue", "resubmit", "stop", "next", "slurm"]
GOES_ON: frozenset[Action] = frozenset({"requeue", "resubmit", "next"})


@dataclass(frozen=True)
class Situation:
    """All that a verdict depends on.

    signal: TERM if it came at any time, else what asked the ranks to stop; None: nothing did.
    stop_asked: the file `stop` is there, which a person makes, and which only a resume removes.
    bad_nodes: those that the preflight found.
    without_progress: attempts in a row, this one last, that ended with no newer checkpoint than they began with.
    tasks_left: of an array whose tasks follow one another, after this one; None: the job is none. A task of such an
        array does not requeue itself.
    """

    outcome: Outcome
    signal: Signal | None
    stop_asked: bool
    bad_nodes: tuple[str, ...]
    without_progress: int
    max_without_progress: int
    may_requeue: bool
    tasks_left: int | None


@dataclass(frozen=True)
class Verdict:
    """What to do, the batch script's exit code, and why, in words."""

    action: Action
    exit_code: int
    why: str


def judge(now: Situation) -> Verdict:
    """After TERM a job never goes on by itself: Slurm sends it to cancel as well as to preempt, and requeues a
    preempted job on its own. Nor does it go on once a person has asked for a stop. A run without progress goes on at
    most `max_without_progress` times in a row."""
    outcome = now.outcome
    if outcome.status == "done":
        return Verdict("done", EXIT_DONE, "the run is complete")
    if outcome.exit_code == EXIT_WRONG_INPUT:
        return Verdict("stop", EXIT_WRONG_INPUT, "what is wrong must be put right by a person; a retry would not help")
    stopped = outcome.status == "stopped"
    code = EXIT_STOPPED if stopped else EXIT_FAILED
    if now.signal == "TERM":
        how = "checkpointed" if stopped else "before it could checkpoint"
        return Verdict("slurm", code, f"cancelled or preempted, {how}; Slurm requeues it if it was preempted")
    if now.stop_asked:
        return Verdict(
            "stop", code, "a person asked for it" + ("" if stopped else ", and it failed before it had saved")
        )
    if now.without_progress >= now.max_without_progress:
        return Verdict(
            "stop",
            EXIT_FAILED,
            f"no progress: {now.without_progress} attempts in a row have ended without a newer checkpoint "
            f"(max_restarts_without_progress is {now.max_without_progress})",
        )
    if stopped:  # by a stray signal to its ranks, if neither by this job nor by a person's file
        return _go_on(now, code, "its time was over" if now.signal else "its ranks were told to stop by somebody else")
    return _go_on(now, code, "it failed, and another attempt may not")


def _go_on(now: Situation, code: int, why: str) -> Verdict:
    chained = now.tasks_left is not None
    if now.tasks_left == 0:
        return Verdict("stop", code, f"{why}; it was the last of its chain")
    if not chained and not now.may_requeue:
        return Verdict("stop", code, f"{why}; the profile forbids a requeue, and there is no chain (--chain)")
    if now.bad_nodes:
        return Verdict("resubmit", code, f"the preflight found bad nodes: {', '.join(now.bad_nodes)}")
    return Verdict("next" if chained else "requeue", code, why)


def attempts_without_progress(lines: Iterable[dict[str, Any]], newest_checkpoint: int) -> int:
    """How many attempts, up to the last one in `lines` (attempts.jsonl), have ended in a row without a newer checkpoint
    than they began with. `newest_checkpoint`: step of the newest now.

    Only attempts since a person submitted the run count. One that was sent TERM does not count, but breaks no row
    either: Slurm ended it, and that says nothing about the run.
    """
    attempts: list[dict[str, Any]] = []
    terminated: list[bool] = []
    for line in lines:
        if line["type"] == "submitted" and line["why"] in ("submit", "resume"):
            # A job may start before its submission is on record.
            own = [attempt["job_id"] == line["job_id"] for attempt in attempts]
            attempts, terminated = list(compress(attempts, own)), list(compress(terminated, own))
        elif line["type"] == "attempt":
            attempts.append(line)
            terminated.append(False)
        elif line["type"] == "signal" and line["name"] == "TERM" and terminated:
            terminated[-1] = True
    begun = [attempt["checkpoint"] for attempt in attempts]
    count = 0
    for before, after, by_slurm in zip(begun, [*begun[1:], newest_checkpoint], terminated, strict=True):
        count = 0 if after > before else count if by_slurm else count + 1
    return count
