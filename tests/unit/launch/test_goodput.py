"""Goodput: every second of a run's wall time is in one account, and in the right one."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.attempts import Ending, endings
from launch.goodput import ACCOUNTS, Goodput, History
from tests.unit.launch.history_of_a_run import MadeUpRun

SECONDS = st.sampled_from((0.0, 0.25, 1.0, 7.5, 300.0))


def told(events: list[dict[str, Any]]) -> History:
    history = History()
    for event in events:
        history.feed(event)
    return history


def check_timeline(history: History, found: Goodput) -> None:
    """No gap and no overlap, neither in the accounts nor in the timeline."""
    assert math.isclose(sum(found.seconds.values()), found.wall_seconds, abs_tol=1e-6)
    assert min(found.seconds.values()) >= 0
    ends = [found.begin]
    for phase in history.phases:
        assert phase.begin == ends[-1]
        assert phase.end > phase.begin
        ends.append(phase.end)
    assert ends[-1] == history.at


@st.composite
def histories(draw: st.DrawFn) -> MadeUpRun:
    """Attempts with everything that may happen in one and between two."""
    run = MadeUpRun(cluster=draw(st.booleans()))
    if run.cluster:
        run.submitted(draw(SECONDS))
    saved = 0
    for _ in range(draw(st.integers(1, 4))):
        run.attempt(saved, draw(SECONDS), draw(SECONDS) if run.cluster else 0.0)
        steps = draw(st.integers(0, 8))
        for _ in range(steps):
            waits, staging, skipped = draw(SECONDS), draw(SECONDS), draw(st.booleans())
            run.makes_step(draw(SECONDS) + 0.5, waits, staging, skipped, reports=draw(st.booleans()))
            happens = draw(st.sampled_from(("nothing", "nothing", "save", "validation", "both", "rewind")))
            if happens in ("save", "both"):
                run.starts_save(draw(SECONDS))
                saved = run.step
            if happens in ("validation", "both"):
                run.validates(draw(SECONDS))
            if happens == "rewind":
                run.rewinds(draw(st.integers(0, run.step)), draw(SECONDS))
                saved = min(saved, run.step)
                run.makes_step(1.0)
        run.reports()  # a save that nobody lives to report held training up for nobody knows how long
        how = draw(st.sampled_from(("stopped", "dies", "failed", "killed after TERM")))
        if how == "stopped" and steps:
            run.ends("stopped", draw(SECONDS), draw(SECONDS))
            saved = run.step
            if run.cluster:
                run.verdict("stopped", "requeue", draw(SECONDS), "stopping")
            run.passes("queued" if run.cluster else "stopped", draw(SECONDS))
        elif how == "killed after TERM" and run.cluster and run.events[-1]["type"] in ("step", "checkpoint"):
            run.write("signal", name="TERM")
            run.passes("queued", draw(SECONDS))
        elif how == "failed" and run.cluster and run.step > saved:
            run.verdict("failed", "requeue", draw(SECONDS), "down")
            run.passes("queued", draw(SECONDS))
        else:
            if run.events[-1]["type"] not in ("step", "checkpoint"):
                run.makes_step(1.0)  # what began after the last event was seen by nobody
            run.passes("down", draw(SECONDS))
            if run.cluster and draw(st.booleans()):
                run.submitted(draw(SECONDS), why="resume")
    run.attempt(saved, 1.0)
    run.makes_step(1.0)
    return run


@settings(max_examples=150)
@given(histories())
def test_every_second_is_where_it_belongs(run: MadeUpRun) -> None:
    history = told(run.events)
    found = history.goodput()
    check_timeline(history, found)
    assert found.wall_seconds == pytest.approx(run.now - run.began)
    assert found.seconds == pytest.approx(run.truth, abs=1e-6)
    assert found.steps_standing == len(run.steps)
    assert sum(found.share(name) for name in ACCOUNTS) == pytest.approx(1)


KINDS = ("submitted", "attempt", "preflight", "environment", "start", "step", "evaluation", "checkpoint", "rewind")


@settings(max_examples=150)
@given(st.data())
def test_nothing_is_lost_whatever_is_written_in_whatever_order(data: st.DataObject) -> None:
    """Clocks that disagree, files that lack a part: the accounts still add up."""
    step, seconds = st.integers(1, 9), st.floats(0, 1e4)
    history = History()
    for kind in data.draw(
        st.lists(st.sampled_from((*KINDS, "signal", "end", "attempt_end", "unheard of")), max_size=30)
    ):
        status = data.draw(st.sampled_from(("done", "stopped", "failed")))
        event: dict[str, Any] = dict.fromkeys(
            ("step_seconds", "data_seconds", "seconds", "stall_seconds"), data.draw(seconds)
        )
        event |= {"type": kind, "time": data.draw(st.floats(1e9, 1e9 + 1e4)), "step": data.draw(step), "tokens": 1}
        event |= {"to_step": data.draw(step), "ranks": 1, "job_id": "1", "restart": 0, "array_task": None, "nodes": []}
        event |= {"why": data.draw(st.sampled_from(("submit", "bad nodes n2"))), "bad": {}, "name": "TERM"}
        event |= {"checkpoint": 0, "skipped": False, "status": status, "message": ""}
        event |= {
            "outcome": {"status": status, "message": ""},
            "action": data.draw(st.sampled_from(("requeue", "stop"))),
        }
        history.feed(event)
    if history.phase is not None:
        check_timeline(history, history.goodput())
        later = history.goodput(history.at + 5)
        assert math.isclose(sum(later.seconds.values()), later.wall_seconds, abs_tol=1e-6)


def test_a_pending_run_waits_and_a_step_under_way_is_in_no_account() -> None:
    run = MadeUpRun(cluster=True)
    run.submitted(0.0)
    assert told(run.events).goodput(now=run.now + 60).seconds["queued"] == 60
    run.attempt(0, 4.0)
    run.makes_step(1.0)
    assert told(run.events).goodput(now=run.now + 60) == told(run.events).goodput()


def test_nodes_that_are_bad_are_no_crash() -> None:
    run = MadeUpRun(cluster=True)
    run.submitted(5.0)
    run.attempt(0, 4.0, checks=2.0, bad={"n1": "its clock is 9 s late"})
    run.write("submitted", job_id="8", nodes=1, ranks=2, cluster="here", why="bad nodes n1")
    run.verdict("failed", "resubmit", 1.0, "starting")
    run.passes("queued", 10.0)
    run.attempt(0, 4.0)
    run.makes_step(1.0)
    history = told(run.events)
    assert history.goodput().seconds == pytest.approx(run.truth)
    assert endings(history.attempts)[0] == Ending("bad nodes", "n1: its clock is 9 s late")


def one_attempt(*signals: str, status: str | None = None, action: str = "requeue", again: bool = False) -> Ending:
    """The ending of an attempt that got these signals; again: Slurm ran it once more."""
    run = MadeUpRun(cluster=True)
    run.submitted(1.0)
    run.attempt(0, 1.0)
    run.makes_step(1.0)
    for name in signals:
        run.write("signal", name=name)
    if status is not None:
        run.verdict(status, action, 1.0, "stopping")
    if again:
        run.attempt(0, 1.0)
    return endings(told(run.events).attempts)[0]


@pytest.mark.parametrize(
    ("signals", "status", "again", "kind"),
    [
        ((), "done", False, "done"),
        ((), "stopped", False, "stopped"),
        (("USR1",), "stopped", True, "time limit"),
        (("time",), "stopped", True, "time limit"),
        (("TERM",), "stopped", True, "preempted"),
        (("TERM",), None, True, "preempted or node lost"),
        (("TERM",), "stopped", False, "cancelled"),
        ((), None, True, "node lost"),
        ((), "failed", True, "failed"),
        ((), None, False, "running"),
    ],
)
def test_why_an_attempt_ended(signals: tuple[str, ...], status: str | None, again: bool, kind: str) -> None:
    found = one_attempt(*signals, status=status, again=again)
    assert found.kind == kind
    assert found.words or kind in ("running", "done", "failed")


def test_a_local_run_that_was_killed() -> None:
    run = MadeUpRun(cluster=False)
    run.attempt(0, 2.0)
    run.makes_step(1.0)
    run.passes("down", 100.0)
    run.attempt(0, 2.0)
    history = told(run.events)
    assert [found.kind for found in endings(history.attempts)] == ["killed", "running"]
    assert history.goodput().seconds["down"] == pytest.approx(100)
    assert history.goodput().in_words().startswith("0.0% useful; down 9")
