"""When ranks are asked to stop, and until when they are waited for."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.cluster.clock import KILL_SECONDS, RECENT, SETTLE_SECONDS, Clock, Pace, Stopwatch
from launch.feed import FileFeed
from pretrain.run_dir import event_line

SECONDS = st.none() | st.floats(0, 1e5)
PACES = st.builds(Pace, SECONDS, SECONDS, SECONDS)


def step(seconds: float) -> dict[str, Any]:
    return {"type": "step", "step_seconds": seconds}


def save(seconds: float) -> dict[str, Any]:
    return {"type": "checkpoint", "stall_seconds": 0.5, "seconds": seconds - 0.5}


def test_a_pace_is_that_of_the_slowest_but_the_first_step_of_an_attempt() -> None:
    events = [
        {"type": "start"},
        step(90.0),
        step(2.0),
        step(3.0),
        {"type": "disk_low", "time": 1e6},  # what lies between a step and a validation is none of its time
        {"type": "evaluation", "by_source": {}, "seconds": 7.0, "time": 2e6},
        save(4.5),
        step(2.5),
        {"type": "start"},
        step(80.0),
    ]
    measured = Stopwatch().see(events)
    assert measured == Pace(step_seconds=3.0, save_seconds=4.5, validation_seconds=7.0)
    assert measured.lead_seconds(300.0) == 7.0 + 2 * 3.0 + 2 * 4.5 + SETTLE_SECONDS


def test_no_pace_before_a_second_step() -> None:
    assert Stopwatch().see([]) == Pace()
    assert Stopwatch().see([{"type": "start"}, step(90.0)]) == Pace()


def test_what_was_not_measured_is_not_nothing() -> None:
    """A run that has made steps but no save, which may take minutes, keeps what the profile says."""
    assert Pace(step_seconds=1.0).lead_seconds(300.0) == 300.0
    assert Pace(save_seconds=1.0).lead_seconds(300.0) == 300.0
    assert Pace(step_seconds=200.0).lead_seconds(300.0) == 400.0 + SETTLE_SECONDS, "nor less than is known"
    assert Pace(1.0, 1.0).lead_seconds(300.0) == 4.0 + SETTLE_SECONDS


def test_a_save_is_remembered_over_any_number_of_steps(tmp_path: Path) -> None:
    """As a run makes that checkpoints every few thousand steps: a file of megabytes, and further looks at it."""
    path = tmp_path / "events.jsonl"
    feed, stopwatch = FileFeed(path), Stopwatch()
    assert stopwatch.see(feed.new()) == Pace()
    steps = event_line("step", {"step_seconds": 1.0, "loss": "x" * 1000})
    slow = event_line("checkpoint", {"stall_seconds": 10.0, "seconds": 400.0})
    compiling = event_line("step", {"step_seconds": 60.0})
    path.write_text(compiling + slow + steps * 2000 + '{"type": "checkp', encoding="utf-8")
    expected = Pace(step_seconds=1.0, save_seconds=410.0)
    assert stopwatch.see(feed.new()) == expected
    assert stopwatch.see(feed.new()) == expected
    with open(path, "a", encoding="utf-8") as file:
        file.write(
            'oint", "stall_seconds": 0.0, "seconds": 2.0}\n'
            + event_line("evaluation", {"by_source": {}, "seconds": 5.0})
        )
    assert stopwatch.see(feed.new()) == Pace(1.0, 410.0, 5.0), "a quicker one does not hide it"


def test_what_has_passed_long_ago_is_forgotten() -> None:
    stopwatch = Stopwatch()
    assert stopwatch.see([step(1.0), step(50.0), save(60.0)]) == Pace(50.0, 60.0)
    assert stopwatch.see([step(2.0)] * (RECENT - 1)) == Pace(50.0, 60.0)
    assert stopwatch.see([step(2.0)]) == Pace(2.0, 60.0)


@given(told=st.floats(1, 1e5), measured=PACES)
def test_no_lead_is_shorter_than_what_is_known(told: float, measured: Pace) -> None:
    lead = measured.lead_seconds(told)
    assert lead >= 2 * (measured.step_seconds or 0.0) + 2 * (measured.save_seconds or 0.0) + SETTLE_SECONDS
    if measured.step_seconds is None or measured.save_seconds is None:
        assert lead >= told


@given(begin=st.floats(0, 1e9), length=st.floats(1, 1e6), told=st.floats(1, 1e5), measured=PACES)
def test_the_stop_comes_before_the_limit_and_leaves_half_of_the_time(
    begin: float, length: float, told: float, measured: Pace
) -> None:
    clock = Clock(begin, begin + length, told, measured)
    assert clock.stop_at is not None
    assert begin + length / 2 <= clock.stop_at * (1 + 1e-12) <= (begin + length) * (1 + 1e-12)
    assert clock.stop_is_due(clock.stop_at, None)
    assert not clock.stop_is_due(clock.stop_at - 1.0, None)
    assert clock.kill_at(clock.stop_at) >= clock.stop_at


def test_the_lead_is_measured_where_it_can_be() -> None:
    assert Clock(0.0, 7200.0, 300.0).stop_at == 6900.0
    assert Clock(0.0, 7200.0, 300.0, Pace(10.0, 20.0, 0.0)).stop_at == 7200 - (60 + SETTLE_SECONDS)
    assert Clock(0.0, 7200.0, 300.0, Pace(10.0)).stop_at == 6900.0
    assert Clock(0.0, 60.0, 300.0).stop_at == 30.0


def test_slurms_signal_is_noted_and_a_persons_obeyed() -> None:
    clock = Clock(0.0, 7200.0, 300.0, Pace(1.0, 1.0, 0.0))
    assert not clock.stop_is_due(6901.0, 6900.0), "the run needs less time than it was guessed to"
    assert not clock.stop_is_due(6850.0, 6841.0), "Slurm may be early"
    assert clock.stop_is_due(3001.0, 3000.0)


def test_without_a_limit_a_signal_is_all_there_is() -> None:
    clock = Clock(0.0, None, 300.0)
    assert clock.stop_at is None
    assert not clock.stop_is_due(1e9, None)
    assert clock.stop_is_due(100.0, 100.0)
    assert clock.kill_at(100.0) == 100.0 + 300.0 - KILL_SECONDS
    assert Clock(0.0, None, 300.0, Pace(1.0)).kill_at(100.0) == 100.0 + 300.0 - KILL_SECONDS
    assert Clock(0.0, None, 300.0, Pace(200.0)).kill_at(100.0) == 100.0 + 400.0 + SETTLE_SECONDS


@pytest.mark.parametrize("asked", [100.0, 1790.0, 1799.0])
def test_ranks_are_killed_in_time_for_a_requeue(asked: float) -> None:
    assert Clock(0.0, 1800.0, 300.0).kill_at(asked) == max(1800.0 - KILL_SECONDS, asked)
