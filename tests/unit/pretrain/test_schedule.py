"""Learning rates and the end of a run, as pure functions."""

import math

import pytest

from pretrain.schedule import finished, learning_rate
from tests.small_run import small_config


def rates(*overrides: str, steps: int = 100) -> list[float]:
    config = small_config("optimizer.lr=1.0", *overrides)
    tokens = 8 * 24
    return [learning_rate(config, step, step * tokens, tokens) for step in range(steps)]


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


def test_finished() -> None:
    steps = small_config().schedule
    assert not finished(steps, 7, 10**9)
    assert finished(steps, 8, 0)
    tokens = small_config("schedule={total_tokens: 100, total_steps: null, warmup_steps: null}").schedule
    assert not finished(tokens, 10**9, 99)
    assert finished(tokens, 0, 100)
