"""In which state a run is: every combination of what its files say and what Slurm says."""

import pytest

from launch.cluster.run_state import OVER, STATE_OF_ENDING, job_state, local_state
from launch.cluster.slurm import Job
from launch.goodput import History
from launch.status_view import COLOURS
from pretrain.outcome import Outcome
from tests.unit.launch.history_of_a_run import MadeUpRun


def told(*happened: str) -> History:
    """A run on a cluster to which this happened, in words."""
    run = MadeUpRun(cluster=True)
    for what in happened:
        match what.split():
            case ["submitted"]:
                run.submitted(5.0)
            case ["attempt"]:
                run.attempt(0, 4.0)
            case ["step"]:
                run.makes_step(1.0)
            case ["signal", name]:
                run.write("signal", name=name)
            case ["end", status]:
                run.ends(status, 1.0, 1.0)
            case ["verdict", status, action]:
                run.verdict(status, action, 1.0, "stopping")
    history = History()
    for event in run.events:
        history.feed(event)
    return history


def job(state: str, start_time: float | None = 0.0, reason: str = "None") -> Job:
    return Job("7", "7", None, state, 1, start_time, None, "n1", reason)


@pytest.mark.parametrize(
    ("happened", "active", "last_word", "expected"),
    [
        (["submitted"], job("PENDING", reason="Resources"), None, "queued"),
        (["submitted"], job("RUNNING"), None, "starting"),
        (["submitted", "attempt"], job("RUNNING"), None, "starting"),
        (["submitted", "attempt", "step"], job("RUNNING"), None, "training"),
        (["submitted", "attempt", "step"], job("RUNNING", start_time=1e12), None, "starting"),  # again, on another node
        (["submitted", "attempt", "step", "signal USR1"], job("RUNNING"), None, "stopping"),
        (["submitted", "attempt", "step", "end stopped"], job("RUNNING"), None, "stopping"),
        (["submitted", "attempt", "step"], job("PENDING", reason="BeginTime"), None, "queued"),  # its node was lost
        (["submitted", "attempt", "step", "verdict stopped requeue"], job("COMPLETING"), None, "queued"),
        (["submitted", "attempt", "step", "verdict done done"], None, "COMPLETED", "done"),
        (["submitted", "attempt", "step", "verdict done done"], job("PENDING"), None, "done"),  # the rest of a chain
        (["submitted", "attempt", "step", "verdict failed stop"], None, "FAILED", "failed"),
        (["submitted", "attempt", "step", "verdict stopped stop"], None, None, "stopped"),
        (["submitted", "attempt", "step", "signal TERM", "verdict stopped slurm"], None, "CANCELLED", "cancelled"),
        (["submitted", "attempt", "step", "signal TERM"], None, "CANCELLED", "cancelled"),
        (["submitted", "attempt", "step"], None, "NODE_FAIL", "lost"),
        (["submitted", "attempt", "step"], None, None, "lost"),
        (["submitted", "attempt", "step"], None, "TIMEOUT", "stopped"),
        (["submitted"], None, "CANCELLED", "cancelled"),
        (["submitted"], None, None, "lost"),
        (["submitted", "attempt", "step", "verdict failed requeue"], None, None, "lost"),
        (["submitted", "attempt", "step", "verdict failed requeue", "verdict failed stop"], None, None, "failed"),
    ],
)
def test_of_a_job(happened: list[str], active: Job | None, last_word: str | None, expected: str) -> None:
    state, why = job_state(told(*happened), active, last_word, unknown=False, stop_asked=False)
    assert state == expected, why


@pytest.mark.parametrize(
    ("happened", "expected"),
    [
        (["submitted"], "queued"),
        (["submitted", "attempt"], "starting"),
        (["submitted", "attempt", "step"], "training"),
        (["submitted", "attempt", "step", "verdict stopped requeue"], "queued"),
        (["submitted", "attempt", "step", "verdict done done"], "done"),
    ],
)
def test_of_a_job_when_slurm_does_not_answer(happened: list[str], expected: str) -> None:
    assert job_state(told(*happened), None, None, unknown=True, stop_asked=False)[0] == expected


def test_why() -> None:
    waits = job_state(told("submitted"), job("PENDING", reason="Resources"), None, unknown=False, stop_asked=False)
    assert waits == ("queued", "waits for free nodes (Resources)")
    unheard = job_state(told("submitted"), job("PENDING", reason="QOSGrpNodeLimit"), None, False, stop_asked=False)
    assert unheard == ("queued", "QOSGrpNodeLimit")
    trains = told("submitted", "attempt", "step")
    assert job_state(trains, job("RUNNING"), None, False, stop_asked=True) == ("stopping", "asked by the file `stop`")
    assert job_state(trains, job("SUSPENDED"), None, False, stop_asked=False) == ("training", "suspended")
    gave_up = told("submitted", "attempt", "step", "verdict failed stop")
    gave_up.attempts[-1].why = "no progress"
    assert job_state(gave_up, None, "FAILED", False, stop_asked=False) == ("failed", "said; no progress")


def test_of_a_local_run() -> None:
    done = Outcome("done", 0, 12, "step 12: the run is complete")
    assert local_state(History(), alive=True, outcome=None, stop_asked=False) == ("starting", "")
    assert local_state(told("attempt", "step"), alive=True, outcome=None, stop_asked=False)[0] == "training"
    assert local_state(told("attempt", "step"), alive=True, outcome=None, stop_asked=True)[0] == "stopping"
    assert local_state(told("attempt", "step"), alive=False, outcome=done, stop_asked=False) == ("done", done.message)
    assert local_state(told("attempt", "step"), alive=False, outcome=None, stop_asked=False)[0] == "lost"


def test_every_state_has_a_colour() -> None:
    assert set(COLOURS) == OVER | {"queued", "starting", "training", "stopping"}
    assert set(STATE_OF_ENDING.values()) <= OVER
