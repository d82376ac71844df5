"""When ranks are asked to stop, and until when they are waited for."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.cluster.clock import KILL_SECONDS, SETTLE_SECONDS, TAIL_BYTES, Clock, Pace, last_events, pace
from pretrain.run_dir import event_line

SECONDS = st.floats(0, 1e5)
PACES = st.none() | st.builds(Pace, SECONDS, SECONDS, SECONDS)


def step(seconds: float, time: float = 0.0) -> dict[str, Any]:
    return {"type": "step", "step_seconds": seconds, "time": time}


def test_a_pace_is_that_of_the_slowest_but_the_first_step_of_an_attempt() -> None:
    events = [
        {"type": "start", "time": 0.0},
        step(90.0, 90.0),
        step(2.0, 92.0),
        step(3.0, 95.0),
        {"type": "evaluation", "time": 102.0},
        {"type": "checkpoint", "stall_seconds": 0.5, "seconds": 4.0, "time": 103.0},
        step(2.5, 106.0),
        {"type": "start", "time": 200.0},
        step(80.0, 290.0),
    ]
    measured = pace(events)
    assert measured == Pace(step_seconds=3.0, save_seconds=4.5, validation_seconds=7.0)
    assert measured.lead_seconds == 7.0 + 2 * 3.0 + 2 * 4.5 + SETTLE_SECONDS


def test_no_pace_before_a_second_step() -> None:
    assert pace([]) is None
    assert pace([{"type": "start", "time": 0.0}, step(90.0)]) is None


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert last_events(path) == []
    path.write_text("".join(event_line("step", {"step": n}) for n in range(20000)) + '{"type": "st', encoding="utf-8")
    events = last_events(path)
    assert events[-1]["step"] == 19999
    assert [event["step"] for event in events] == list(range(events[0]["step"], 20000))
    assert 1000 < len(events) < 20000
    assert path.stat().st_size > TAIL_BYTES


@given(begin=st.floats(0, 1e9), length=st.floats(1, 1e6), told=st.floats(1, 1e5), measured=PACES)
def test_the_stop_comes_before_the_limit_and_leaves_half_of_the_time(
    begin: float, length: float, told: float, measured: Pace | None
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


@pytest.mark.parametrize("asked", [100.0, 1790.0, 1799.0])
def test_ranks_are_killed_in_time_for_a_requeue(asked: float) -> None:
    assert Clock(0.0, 1800.0, 300.0).kill_at(asked) == max(1800.0 - KILL_SECONDS, asked)
