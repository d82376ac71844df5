"""Numbers of every step: what is taken back, and drawing with few points without a lie."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.curves import COLUMNS, StepCurves, envelope, smoothed


def step(number: int, **values: object) -> dict[str, object]:
    return {"type": "step", "step": number, **dict.fromkeys(COLUMNS, 1.0), **values}


def test_a_step_made_again_takes_back_what_followed() -> None:
    curves = StepCurves()
    for number, loss in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 6.0)):
        curves.add(step(number, loss=loss))
    assert curves.steps.tolist() == [1, 2]
    assert curves.column("loss").tolist() == [9.0, 6.0]
    assert [stretch.steps.tolist() for stretch in curves.taken_back] == [[2, 3]]
    curves.take_back(0)
    assert len(curves) == 0
    assert [stretch.column("loss").tolist() for stretch in curves.taken_back] == [[8.0, 7.0], [9.0, 6.0]]


def test_experts_and_what_is_missing() -> None:
    curves = StepCurves()
    curves.add(step(1, expert_imbalance=None, expert_load_max_over_mean={"0": 1.0, "1": 2.0}))
    curves.add({"step": 2, "loss": math.inf})
    assert curves.column("expert_imbalance")[0] == 1.5
    assert np.isnan(curves.column("lr")[1])


NUMBERS = st.one_of(st.floats(-1e6, 1e6), st.sampled_from((math.nan, math.inf, -math.inf)))


@settings(max_examples=200)
@given(st.lists(NUMBERS, max_size=60), st.integers(1, 20), st.integers(1, 5))
def test_an_envelope_hides_no_extreme(values: list[float], bins: int, stride: int) -> None:
    y = np.array(values, dtype=np.float64)
    x = np.arange(len(y)) * stride + 7
    drawn = envelope(x, y, bins)
    finite = y[np.isfinite(y)]
    assert len(drawn.x) <= max(bins, 0) or drawn.exact
    assert drawn.exact == (len(finite) <= bins)
    if len(finite):
        assert drawn.low.min() == finite.min()
        assert drawn.high.max() == finite.max()
        assert np.all(drawn.low <= drawn.mean + 1e-6)
        assert np.all(drawn.mean <= drawn.high + 1e-6)
        assert np.all(np.diff(drawn.x) > 0)


@settings(max_examples=100)
@given(st.lists(NUMBERS, min_size=1, max_size=30), st.integers(1, 9))
def test_smoothing_is_the_mean_of_what_was(values: list[float], window: int) -> None:
    found = smoothed(np.array(values), window)
    for i, value in enumerate(found):
        seen = [v for v in values[max(0, i + 1 - window) : i + 1] if math.isfinite(v)]
        assert math.isclose(value, math.fsum(seen) / len(seen), abs_tol=1e-6) if seen else math.isnan(value)
