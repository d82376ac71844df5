"""What is next, over all that can have happened."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.cluster.verdict import GOES_ON, Situation, attempts_without_progress, judge
from pretrain.outcome import Outcome

DONE = Outcome("done", 0, 12, "step 12: the run is complete")
STOPPED = Outcome("stopped", 75, 7, "step 7: stopped on request, checkpointed")
FAILED = Outcome("failed", 1, 7, "rank 1 was killed by SIGKILL")
WRONG = Outcome("failed", 2, 0, "data.sources: no such folder")

SITUATIONS = st.builds(
    Situation,
    outcome=st.sampled_from([DONE, STOPPED, FAILED, WRONG]),
    signal=st.sampled_from([None, "USR1", "time", "TERM"]),
    stop_asked=st.booleans(),
    bad_nodes=st.sampled_from([(), ("n2",), ("n2", "n7")]),
    without_progress=st.integers(0, 6),
    max_without_progress=st.integers(1, 4),
    may_requeue=st.booleans(),
    tasks_left=st.none() | st.integers(0, 3),
)
FAILS = Situation(
    outcome=FAILED,
    signal=None,
    stop_asked=False,
    bad_nodes=(),
    without_progress=1,
    max_without_progress=3,
    may_requeue=True,
    tasks_left=None,
)


@given(now=SITUATIONS)
def test_a_job_goes_on_only_where_it_may(now: Situation) -> None:
    verdict = judge(now)
    if verdict.action in GOES_ON:
        assert now.signal != "TERM"
        assert not now.stop_asked, "a person's stop is for good, whatever else has happened"
        assert now.outcome not in (DONE, WRONG)
        assert now.without_progress < now.max_without_progress
        assert (verdict.action == "next") <= bool(now.tasks_left)
        assert now.tasks_left or (now.tasks_left is None and now.may_requeue)
        assert (verdict.action == "resubmit") == bool(now.bad_nodes)
    assert (verdict.action == "slurm") <= (now.signal == "TERM")
    assert verdict.why
    assert "\n" not in verdict.why


@given(now=SITUATIONS)
def test_the_exit_code_says_how_the_attempt_ended(now: Situation) -> None:
    verdict = judge(now)
    assert (verdict.action == "done") == (verdict.exit_code == 0) == (now.outcome == DONE)
    assert (verdict.exit_code == 2) == (now.outcome == WRONG)
    if verdict.exit_code == 75:
        assert now.outcome == STOPPED


@given(now=SITUATIONS)
def test_a_stop_that_was_asked_for_stops_what_is_not_done(now: Situation) -> None:
    verdict = judge(replace(now, stop_asked=True))
    if now.outcome == DONE:
        assert verdict.action == "done"
    else:
        assert verdict.action == ("slurm" if now.signal == "TERM" and now.outcome != WRONG else "stop")


@given(now=SITUATIONS)
def test_who_may_go_on_does(now: Situation) -> None:
    """What the first test allows is also what happens: nobody has to wake up at night for it."""
    allowed = now.tasks_left or (now.tasks_left is None and now.may_requeue)
    asked = now.outcome in (FAILED, STOPPED)
    may = now.signal != "TERM" and not now.stop_asked
    if may and asked and allowed and now.without_progress < now.max_without_progress:
        assert judge(now).action in GOES_ON


@pytest.mark.parametrize(
    ("change", "action", "code"),
    [
        ({}, "requeue", 1),
        ({"outcome": STOPPED, "signal": "USR1"}, "requeue", 75),
        ({"outcome": STOPPED, "signal": "time"}, "requeue", 75),
        ({"outcome": STOPPED, "signal": "TERM"}, "slurm", 75),
        ({"signal": "TERM"}, "slurm", 1),
        ({"outcome": DONE, "signal": "TERM"}, "done", 0),
        ({"outcome": STOPPED}, "requeue", 75),
        ({"outcome": STOPPED, "stop_asked": True}, "stop", 75),
        ({"stop_asked": True}, "stop", 1),
        ({"outcome": STOPPED, "signal": "USR1", "stop_asked": True}, "stop", 75),
        ({"outcome": STOPPED, "signal": "TERM", "stop_asked": True}, "slurm", 75),
        ({"bad_nodes": ("n2",), "stop_asked": True}, "stop", 1),
        ({"outcome": WRONG}, "stop", 2),
        ({"bad_nodes": ("n2",)}, "resubmit", 1),
        ({"without_progress": 3}, "stop", 1),
        ({"may_requeue": False}, "stop", 1),
        ({"may_requeue": False, "tasks_left": 2}, "next", 1),
        ({"may_requeue": False, "tasks_left": 0}, "stop", 1),
        ({"outcome": STOPPED, "signal": "USR1", "may_requeue": False, "tasks_left": 0}, "stop", 75),
        ({"outcome": STOPPED, "signal": "USR1", "without_progress": 3}, "stop", 1),
    ],
)
def test_each_case(change: dict[str, object], action: str, code: int) -> None:
    verdict = judge(replace(FAILS, **change))  # type: ignore[arg-type]
    assert (verdict.action, verdict.exit_code) == (action, code)


def attempt(checkpoint: int, *signals: str) -> list[dict[str, object]]:
    signalled = [{"type": "signal", "name": name} for name in signals]
    return [{"type": "attempt", "job_id": "12", "checkpoint": checkpoint}, *signalled]


SUBMITTED = {"type": "submitted", "job_id": "12", "why": "submit"}
RESUMED = {"type": "submitted", "job_id": "13", "why": "resume"}
ELSEWHERE = {"type": "submitted", "job_id": "13", "why": "bad nodes n2"}


@pytest.mark.parametrize(
    ("lines", "newest", "count"),
    [
        ([SUBMITTED, *attempt(0)], 0, 1),
        ([SUBMITTED, *attempt(0)], 5, 0),
        ([SUBMITTED, *attempt(0), *attempt(0), *attempt(0)], 0, 3),
        ([SUBMITTED, *attempt(0), *attempt(0), *attempt(4)], 4, 1),
        ([SUBMITTED, *attempt(0), *attempt(4), *attempt(4)], 4, 2),
        ([SUBMITTED, *attempt(4), *attempt(0)], 0, 2),  # it went back to an older checkpoint, and no further
        ([SUBMITTED, *attempt(0), *attempt(0, "TERM"), *attempt(0)], 0, 2),  # preempted: Slurm's doing
        ([SUBMITTED, *attempt(0, "USR1"), *attempt(0, "TERM")], 0, 1),
        ([SUBMITTED, *attempt(0), *attempt(0), RESUMED, *attempt(0)], 0, 1),
        ([*attempt(0), SUBMITTED], 0, 1),  # it started before its submission was on record
        ([SUBMITTED, *attempt(0), ELSEWHERE, *attempt(0)], 0, 2),
    ],
)
def test_attempts_without_progress(lines: list[dict[str, object]], newest: int, count: int) -> None:
    assert attempts_without_progress(lines, newest) == count


@given(now=SITUATIONS, gains=st.lists(st.integers(0, 1), max_size=30))
def test_a_run_without_progress_comes_to_an_end(now: Situation, gains: list[int]) -> None:
    """After its last progress, a run that nobody but itself starts again has at most so many attempts."""
    lines, checkpoint = [SUBMITTED], 0
    for number, gain in enumerate(itertools.chain(gains, itertools.repeat(0))):
        lines += attempt(checkpoint)
        checkpoint += gain
        count = attempts_without_progress(lines, checkpoint)
        if judge(replace(now, without_progress=count)).action not in GOES_ON:
            break
        assert number < len(gains) + now.max_without_progress
