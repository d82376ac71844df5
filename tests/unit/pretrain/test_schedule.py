"""Learning rates, batch sizes and the end of a run, as pure functions."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.schedule import batch_plan, batch_size_at, finished, learning_rate
from pretrain.state import TrainState
from tests.small_run import small_config


def rates(*overrides: str, steps: int = 100) -> list[float]:
    config = small_config("optimizer.lr=1.0", *overrides)
    tokens = 8 * 24
    return [learning_rate(config, step, step * tokens) for step in range(steps)]


@pytest.mark.parametrize("unit", ["steps", "tokens"])
@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_schedules(name: str, unit: str) -> None:
    scale = 1 if unit == "steps" else 8 * 24
    decay = f", decay_{unit}: {20 * scale}" if name == "wsd" else ""
    other = "tokens" if unit == "steps" else "steps"
    lengths = f"warmup_{unit}: {10 * scale}, total_{unit}: {100 * scale}, total_{other}: null, warmup_{other}: null"
    found = rates(f"schedule={{name: {name}, {lengths}, min_lr_ratio: 0.2{decay}}}", steps=101)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])  # the first step already moves
    assert found[10] == pytest.approx(1.0)
    assert found[100] == pytest.approx(1.0 if name == "constant" else 0.2)
    middle = {"cosine": 0.2 + 0.8 * 0.5, "linear": 0.6, "wsd": 1.0, "constant": 1.0}[name]
    assert found[55] == pytest.approx(middle)
    if name == "cosine":
        assert found[32] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 22 / 90)))
    if name == "wsd":
        assert found[79] == pytest.approx(1.0)
        assert found[90] == pytest.approx(0.6)


def test_a_longer_run_keeps_its_past() -> None:
    """total_steps is free on resume: wsd's stable part does not depend on it."""
    base = "schedule={name: wsd, warmup_steps: 10, decay_steps: 10, total_steps: %d}"
    assert rates(base % 100)[:90] == rates(base % 200)[:90]


def test_batch_ramp() -> None:
    config = small_config("batch={ramp: [[96, 2], [288, 4]]}")
    plan = list(itertools.islice(batch_plan(config, 0, 0), 6))
    assert plan == [(0, 2), (2, 2), (4, 4), (8, 4), (12, 8), (20, 8)]
    # Random access: the plan from anywhere is the rest of the plan.
    for position, _ in plan:
        rest = list(itertools.islice(batch_plan(config, position, position * 24), 3))
        assert rest == [entry for entry in itertools.islice(batch_plan(config, 0, 0), 20) if entry[0] >= position][:3]
    assert batch_size_at(config, 10**9) == 8


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=4),
    st.integers(1, 8),
)
def test_what_is_left_out_is_never_read(ranges: list[tuple[int, int]], size: int) -> None:
    left_out = [(start, start + length) for start, length in ranges]
    config = small_config(f"batch={{global_batch_size: {size}, micro_batch_size: 1}}")
    plan = list(itertools.islice(batch_plan(config, 0, 0, left_out), 20))
    read = [position for first, count in plan for position in range(first, first + count)]
    assert read == sorted(set(read))
    assert not any(start <= position < end for position in read for start, end in left_out)
    gaps = set(range(read[-1])) - set(read)
    near = {p for start, end in left_out for p in range(start - size + 1, end)}
    assert gaps <= near  # nothing but what is left out, and what remains before it of a batch that would reach in
    state = TrainState()
    state.leave_out(left_out)
    for first, count in plan:
        state.advance(count, 1)
        assert state.position == first + count


def test_finished() -> None:
    steps = small_config().schedule
    assert not finished(steps, 7, 10**9)
    assert finished(steps, 8, 0)
    tokens = small_config("schedule={total_tokens: 100, total_steps: null, warmup_steps: null}").schedule
    assert not finished(tokens, 10**9, 99)
    assert finished(tokens, 0, 100)
