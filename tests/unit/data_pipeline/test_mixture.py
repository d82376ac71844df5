from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import MIXTURE_BLOCK, Mixture, effective_weights, shares

WEIGHTS = {"a": 0.7, "b": 0.2, "c": 0.1}
MIXTURES = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(1, 100), min_size=1)


@given(MIXTURES)
def test_shares_are_within_one_of_exact(weights: dict[str, float]) -> None:
    names = sorted(weights)
    counts = shares(weights, names)
    assert sum(counts) == MIXTURE_BLOCK
    total = sum(map(Fraction, weights.values()))
    for name, count in zip(names, counts, strict=True):
        assert abs(count - Fraction(weights[name]) / total * MIXTURE_BLOCK) < 1


@settings(max_examples=30)
@given(MIXTURES, st.integers(0, 10**7), st.integers(0, 10**6), st.integers(1, 4))
def test_realised_shares_of_whole_blocks(weights: dict[str, float], start: int, first: int, blocks: int) -> None:
    """Wherever the stage begins, in any stretch of whole mixture blocks."""
    begin = start + first * MIXTURE_BLOCK
    place, _ = Mixture(start, weights, {}, 3).ordinals(np.arange(begin, begin + blocks * MIXTURE_BLOCK))
    realised = np.bincount(place, minlength=len(weights)) / (blocks * MIXTURE_BLOCK)
    exact = np.array([weights[name] for name in sorted(weights)]) / sum(weights.values())
    assert np.abs(realised - exact).max() < 1 / MIXTURE_BLOCK


def test_sources_are_spread_evenly_within_a_block() -> None:
    place, _ = Mixture(0, WEIGHTS, {}, 1).ordinals(np.arange(100 * MIXTURE_BLOCK))
    counts = np.stack([np.bincount(part, minlength=3) for part in np.split(place, 1600)])
    expected = counts.mean(axis=0)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    degrees = 1600 * 2
    assert chi_squared < degrees + 4 * np.sqrt(2 * degrees)
    # As many runs of one source as of a shuffled sequence: no pattern that a batch could meet.
    same = np.mean(place[1:] == place[:-1])
    assert abs(same - (expected / expected.sum()) @ (expected / expected.sum())) < 4 / np.sqrt(len(place))


@given(st.integers(0, 9000), st.sampled_from("abc"), st.dictionaries(st.sampled_from("abz"), st.integers(0, 5000)))
@settings(max_examples=50)
def test_ordinals_count_what_was_served(later: int, name: str, consumed: dict[str, int]) -> None:
    start = 77
    mixture = Mixture(start, WEIGHTS, consumed, 5)
    place, ordinal = mixture.ordinals(np.arange(start, start + later + 3 * MIXTURE_BLOCK))
    for number, served in enumerate(mixture.names):
        of_source = ordinal[place == number]
        assert np.array_equal(of_source, consumed.get(served, 0) + np.arange(len(of_source)))
        before = consumed.get(served, 0) + int(np.sum(place[:later] == number))
        assert mixture.consumed_before(start + later)[served] == before
    of_name = np.flatnonzero(place == mixture.names.index(name))
    for nth in (0, 1, len(of_name) // 2, len(of_name) - 1):
        assert mixture.position_after(name, consumed.get(name, 0) + nth) == start + of_name[nth] + 1


def test_a_mixture_of_nothing_keeps_what_was_consumed() -> None:
    assert Mixture(10, {}, {"a": 4}, 0).consumed_before(9999) == {"a": 4}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "no source"),
        ({"a": 0.0}, "'a' is 0.0, but weights must be positive"),
        ({"a": 1.0, "b": float("nan")}, "'b' is nan, but weights must be positive"),
        ({"a": float("inf")}, "weights must be positive"),
        ({"a": 1.0, "b": 1e-5}, "'b' has 1e-05 of the mixture"),
    ],
)
def test_unusable_weights(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shares(weights, sorted(weights))


def test_temperature() -> None:
    weights, tokens = {"a": 1.0, "b": 2.0}, {"a": 9_000, "b": 500, "not of this stage": 7}
    assert effective_weights(weights, tokens, None) == weights
    assert effective_weights(weights, tokens, 1.0) == pytest.approx({"a": 0.9, "b": 0.1})
    assert effective_weights(weights, tokens, 2.0) == pytest.approx({"a": 0.75, "b": 0.25})
    assert effective_weights(weights, tokens, 1e9) == pytest.approx({"a": 0.5, "b": 0.5})


def test_extreme_temperatures_neither_overflow_nor_divide_by_zero() -> None:
    cold = effective_weights({"a": 1.0, "b": 1.0}, {"a": 10**13, "b": 10**12}, 1e-3)
    assert cold == {"a": 1.0, "b": 0.0}
    assert effective_weights({"a": 1.0}, {"a": 0}, 2.0) == {"a": 0.0}
