import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.samples import Extents, Listed, Windows, regroup
from tests.unit.data_pipeline.ordered_sources import tokens_of


@st.composite
def some_extents(draw: st.DrawFn) -> Extents:
    """Samples of some extents each, which cover a stream in a random order; some go on where the last one ended."""
    counts = draw(st.lists(st.integers(1, 40), max_size=30))
    order = draw(st.permutations(range(len(counts))))
    edges = sorted(draw(st.sets(st.integers(1, len(counts) - 1)))) if len(counts) > 1 else []
    starts = np.cumsum([0, *counts])[:-1]
    first = [0, *edges, len(counts)] if counts else [0]
    return Extents(np.array(first), starts[list(order)], np.array(counts, dtype=np.int64)[list(order)])


@given(tokens=st.integers(0, 500), block=st.integers(1, 100), T=st.integers(1, 100))
@example(tokens=1, block=8, T=8)
@example(tokens=17, block=8, T=8)
@example(tokens=18, block=8, T=3)
def test_windows_hold_every_input_once_in_file_order(tokens: int, block: int, T: int) -> None:
    T = min(T, block)
    windows = Windows(tokens, block, T)
    inputs = max(0, tokens - 1)
    assert len(windows.block_samples) == len(windows.block_tokens) == -(-inputs // block)
    extents = windows.extents(np.arange(windows.block_samples.sum()))
    assert np.array_equal(tokens_of(extents), np.arange(inputs))
    assert np.all((extents.tokens >= 1) & (extents.tokens <= T))
    block_of = np.repeat(np.arange(len(windows.block_samples)), windows.block_samples)
    assert np.array_equal(extents.start // block, block_of)
    assert np.array_equal((extents.start + extents.count - 1) // block, block_of)
    assert np.array_equal(np.bincount(block_of, extents.tokens, len(windows.block_tokens)), windows.block_tokens)


def test_only_the_last_window_of_a_block_is_short() -> None:
    counts = Windows(1000, 100, 30).extents(np.arange(40)).count
    assert counts.tolist() == [30, 30, 30, 10] * 9 + [30, 30, 30, 9]


def test_a_block_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="block of 7 tokens is shorter than the sequence length 8: raise data.shuffle"):
        Windows(1000, 7, 8)


@given(some_extents(), st.lists(st.integers(0, 100), max_size=20))
def test_listed_samples_are_taken_one_by_one(extents: Extents, numbers: list[int]) -> None:
    numbers = [number % len(extents) for number in numbers] if len(extents) else []
    listed = Listed(extents, 40)
    taken = listed.extents(np.array(numbers, dtype=np.int64))
    assert len(taken) == len(numbers)
    assert listed.block_samples.tolist() == [len(extents)]
    assert listed.block_tokens.tolist() == [extents.tokens.sum()]
    for place, number in enumerate(numbers):
        got, expected = slice(*taken.first[place : place + 2]), slice(*extents.first[number : number + 2])
        assert np.array_equal(taken.start[got], extents.start[expected])
        assert np.array_equal(taken.count[got], extents.count[expected])
        assert taken.tokens[place] == extents.count[expected].sum()


@given(some_extents(), st.integers(1, 60))
def test_regrouping_keeps_the_tokens_in_order_and_fills_the_samples(extents: Extents, T: int) -> None:
    regrouped = regroup(extents, T, whole=False)
    assert np.array_equal(tokens_of(regrouped), tokens_of(extents))
    assert np.all(regrouped.tokens[:-1] == T)
    assert np.all((regrouped.tokens >= 1) & (regrouped.tokens <= T))
    # Nothing is in two pieces that could be in one.
    inner = np.setdiff1d(np.arange(1, len(regrouped.start)), regrouped.first)
    assert np.all(regrouped.start[inner] != regrouped.start[inner - 1] + regrouped.count[inner - 1])


@given(some_extents(), st.integers(1, 60))
def test_regrouping_whole_extents_cuts_none_that_fits(extents: Extents, T: int) -> None:
    regrouped = regroup(extents, T, whole=True)
    assert np.array_equal(tokens_of(regrouped), tokens_of(extents))
    assert np.all((regrouped.tokens >= 1) & (regrouped.tokens <= T))
    pieces = list(zip(regrouped.start.tolist(), regrouped.count.tolist(), strict=True))
    for start, count in zip(extents.start.tolist(), extents.count.tolist(), strict=True):
        cut = [piece for piece in pieces if start <= piece[0] < start + count]
        assert [size for _, size in cut] == [T] * (count // T) + [count % T] * (count % T > 0)
    # A sample ends where the next extent does not fit.
    following = regrouped.count[regrouped.first[1:-1]]
    assert np.all(regrouped.tokens[:-1] + following > T)


def test_regrouping_by_hand() -> None:
    windows = Extents(np.array([0, 1, 2, 3]), np.array([40, 0, 5]), np.array([5, 5, 3]))
    longer = regroup(windows, 7, whole=False)
    assert [longer.first.tolist(), longer.start.tolist(), longer.count.tolist()] == [[0, 2, 3], [40, 0, 2], [5, 2, 6]]
    whole = regroup(windows, 4, whole=True)
    assert [whole.first.tolist(), whole.start.tolist(), whole.count.tolist()] == [
        [0, 1, 2, 3, 5],
        [40, 44, 0, 4, 5],
        [4, 1, 4, 1, 3],
    ]
