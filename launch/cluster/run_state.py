"""In which state a run is, from what its files tell and what Slurm, or the machine, says of its processes. Pure."""

from launch.attempts import Ending, endings
from launch.cluster.slurm import Job
from launch.goodput import History
from pretrain.outcome import Outcome

# The states in which a run does not go on by itself; lost: it ended, and nothing says how.
OVER = frozenset({"done", "stopped", "failed", "cancelled", "lost"})
STATE_OF_ENDING = {
    **dict.fromkeys(("stopped", "time limit"), "stopped"),
    **dict.fromkeys(("failed", "bad nodes"), "failed"),
    "done": "done",
    "cancelled": "cancelled",
}
# Slurm's reasons for a pending job that most people meet; its manual (squeue, JOB REASON CODES) has them all.
REASONS = {
    "Resources": "waits for free nodes",
    "Priority": "others come first",
    "BeginTime": "Slurm lets a while pass before it runs it again",
    "JobArrayTaskLimit": "the task before it has not ended",
    "Dependency": "waits for another job",
    "PartitionDown": "the partition is down",
    "PartitionTimeLimit": "the partition does not allow so long a job: it will not start",
    "PartitionNodeLimit": "the partition does not allow so many nodes: it will not start",
    "JobHeldUser": "held: let it go with scontrol release",
    "JobHeldAdmin": "held by the cluster's operators",
    "ReqNodeNotAvail": "a node that it needs is not available",
}
State = tuple[str, str]  # and why, in words


def job_state(history: History, active: Job | None, last_word: str | None, unknown: bool, stop_asked: bool) -> State:
    """Of a run that is a job. active: what Slurm has of it that is not over; last_word: in which state the last that
    is over ended; unknown: Slurm did not answer. stop_asked: the file `stop` is there."""
    if has_ended(history) or (active is None and not unknown):
        return _over(history, last_word)
    if active is None:
        return ("queued", "") if history.phase == "queued" else _going(history, stop_asked)
    if active.state == "PENDING":
        words = REASONS.get(active.reason.partition(",")[0])
        return "queued", f"{words} ({active.reason})" if words else active.reason
    if active.state == "COMPLETING" and history.phase == "queued":
        return "queued", "its last attempt is being cleared away"
    why = "" if active.state == "RUNNING" else active.state.lower()
    if active.start_time is not None and active.start_time > history.at:  # it has not said a word yet
        return "starting", why
    state, words = _going(history, stop_asked)
    return state, words or why


def local_state(history: History, alive: bool, outcome: Outcome | None, stop_asked: bool) -> State:
    """Of a run on one machine without a scheduler. alive: its processes are there; outcome: as they left it."""
    if alive:
        return _going(history, stop_asked)
    if outcome is not None:
        return outcome.status, outcome.message
    if history.attempts and history.attempts[-1].status is not None:
        return STATE_OF_ENDING[endings(history.attempts)[-1].kind], history.attempts[-1].message
    return "lost", "its processes are gone, and have not said why"


def has_ended(history: History) -> bool:
    """Whether its files say that it is over, so that Slurm need not be asked."""
    return history.open is None and history.phase in ("stopped", "down")


def _going(history: History, stop_asked: bool) -> State:
    """Of a run that goes on: how far the attempt is."""
    attempt = history.open
    if attempt is None or history.phase not in ("training", "stopping"):
        return "starting", ""
    if history.phase == "stopping":
        return "stopping", ""
    if attempt.signals or stop_asked:
        return "stopping", f"asked by {attempt.signals[-1]}" if attempt.signals else "asked by the file `stop`"
    return "training", ""


def _over(history: History, last_word: str | None) -> State:
    """Of a run that Slurm has no more of. last_word: the state in which its job ended, if Slurm still knows."""
    ended = endings(history.attempts)[-1] if history.attempts else Ending("running", "")
    by_slurm = f"Slurm says {last_word}" if last_word is not None else "Slurm does not know it any more"
    if last_word == "TIMEOUT" and ended.kind != "done":
        return "stopped", "at its time limit"
    asked_again = history.phase == "queued" and ended.kind != "cancelled"
    if ended.kind in STATE_OF_ENDING and not asked_again:
        last = history.attempts[-1]
        gave_up = ended.kind in ("failed", "time limit") and last.action == "stop"
        return STATE_OF_ENDING[ended.kind], "; ".join([ended.words, *([last.why] if gave_up else [])])
    if last_word == "CANCELLED":
        return "cancelled", "before it ran" if history.phase == "queued" else "while it ran"
    if history.phase == "queued":
        return "lost", f"it was to run{' again' * bool(history.attempts)}, and {by_slurm}"
    return "lost", f"its job is gone without a word from it: {by_slurm}"
