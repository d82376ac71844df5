"""The order of one source: epochs, shuffles, and what a change of the sequence length leaves of them."""

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.source_order import OrderedSource, SourceOrder
from tests.unit.data_pipeline.ordered_sources import DocumentSource, WindowSource, tokens_of

Changes = Sequence[tuple[int, int]]
"""(ordinal, T), the first at 0."""


def order_of(source: OrderedSource, changes: Changes, K: int = 4, seed: int = 7) -> SourceOrder:
    order = SourceOrder("a", source, K, seed)
    for ordinal, T in changes:
        order.recut(ordinal, T)
    return order


def served(order: SourceOrder, end: int, first: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Of each ordinal: its epoch, and its tokens as places in the stream."""
    epoch, cut, number = order.pick(np.arange(first, end))
    return epoch, [tokens_of(order.extents(c, np.array([n]))) for c, n in zip(cut, number, strict=True)]


def file_places(order: SourceOrder, end: int) -> np.ndarray:
    """First token of each ordinal's sample, where the samples are windows."""
    _, cut, number = order.pick(np.arange(end))
    return np.concatenate([order.extents(c, number[cut == c]).start for c in np.unique(cut)])


@st.composite
def windows(draw: st.DrawFn) -> WindowSource:
    return WindowSource(draw(st.integers(2, 900)), draw(st.integers(12, 120)))


@st.composite
def documents(draw: st.DrawFn) -> DocumentSource:
    block = st.lists(st.integers(1, 30), max_size=12).map(tuple)
    return DocumentSource(tuple(draw(st.lists(block, min_size=1, max_size=9).filter(any))))


@st.composite
def changes(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Steps of 0 replace a length before anything was served; short ones change while a group is drained."""
    steps = draw(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=6))
    ordinals = np.cumsum([0, *(step for step, _ in steps)]).tolist()
    return list(zip(ordinals, [draw(st.integers(1, 12)), *(T for _, T in steps)], strict=True))


@settings(max_examples=80)
@given(source=windows() | documents(), changes=changes(), K=st.integers(1, 5), seed=st.integers(0, 5))
@example(source=WindowSource(2, 12), changes=[(0, 3), (1, 5), (2, 1)], K=1, seed=0)
@example(source=WindowSource(481, 48), changes=[(0, 4), (24, 8), (30, 3), (31, 12), (100, 8)], K=2, seed=0)
@example(source=DocumentSource(((5,), (), (30, 2), ())), changes=[(0, 8), (1, 4), (2, 8)], K=1, seed=0)
def test_each_epoch_serves_every_token_once_whatever_changes(
    source: WindowSource | DocumentSource, changes: list[tuple[int, int]], K: int, seed: int
) -> None:
    order = order_of(source, changes, K, seed)
    (last_changed,), _, _ = order.pick(np.array([changes[-1][0]]))
    end = order.end_of(last_changed + 2)
    epoch, tokens = served(order, end)
    assert np.all(np.diff(epoch) >= 0)
    assert epoch[-1] == last_changed + 1
    inputs = source.tokens if source.whole else source.tokens - 1
    for number in range(epoch[-1] + 1):
        together = np.concatenate([tokens[i] for i in np.flatnonzero(epoch == number)])
        assert np.array_equal(np.sort(together), np.arange(inputs))
    lengths = np.array([T for _, T in changes])[
        np.searchsorted([ordinal for ordinal, _ in changes], np.arange(end), side="right") - 1
    ]
    sizes = np.array([len(sample) for sample in tokens])
    assert np.all((sizes >= 1) & (sizes <= lengths))
    # Consumption in closed form is what was served.
    totals = np.concatenate([[0], np.cumsum(sizes)])
    for ordinal in {0, end // 3, end // 2, end, *(ordinal for ordinal, _ in changes)}:
        consumed, epochs = order.consumed_before(ordinal)
        assert consumed == totals[ordinal]
        assert epochs == pytest.approx(totals[ordinal] / inputs)


@settings(max_examples=50)
@given(source=windows() | documents(), changes=changes(), epochs=st.integers(1, 4))
def test_the_end_of_an_epoch_in_closed_form(
    source: WindowSource | DocumentSource, changes: list[tuple[int, int]], epochs: int
) -> None:
    order = order_of(source, changes)
    end = order.end_of(epochs)
    epoch, _ = served(order, max(end, changes[-1][0]) + 1)
    first_after = int(np.argmax(epoch >= epochs))
    assert end == first_after or first_after <= end <= changes[-1][0]


@settings(max_examples=50)
@given(windows() | documents(), changes(), st.lists(st.integers(0, 500), min_size=1, max_size=60))
def test_random_access_equals_sequential(
    source: WindowSource | DocumentSource, changes: list[tuple[int, int]], ordinals: list[int]
) -> None:
    everything = np.stack(order_of(source, changes).pick(np.arange(501)))
    some = np.stack(order_of(source, changes).pick(np.array(ordinals)))
    assert np.array_equal(some, everything[:, ordinals])


@settings(max_examples=50)
@given(changes=changes(), blocks=st.lists(st.lists(st.integers(1, 30), max_size=9).map(tuple), min_size=1).filter(any))
def test_a_document_that_always_fitted_is_never_cut(
    changes: list[tuple[int, int]], blocks: list[tuple[int, ...]]
) -> None:
    source = DocumentSource(tuple(blocks))
    order = order_of(source, changes)
    _, cut, number = order.pick(np.arange(changes[-1][0] + 200))
    lengths = np.array([length for block in blocks for length in block])
    starts = np.cumsum(lengths) - lengths
    shortest = min(T for _, T in changes)
    for c, n in zip(cut, number, strict=True):
        extents = order.extents(c, np.array([n]))
        document = np.searchsorted(starts, extents.start, side="right") - 1
        fits = lengths[document] <= shortest
        assert np.array_equal(extents.count[fits], lengths[document][fits])


@settings(max_examples=30)
@given(st.integers(0, 50), st.integers(1, 12), st.integers(1, 12))
def test_a_length_that_served_nothing_leaves_no_trace(ordinal: int, passing: int, last: int) -> None:
    source = WindowSource(481, 48)
    direct = order_of(source, [(0, 8), (ordinal, last)])
    detour = order_of(source, [(0, 8), (ordinal, passing), (ordinal, last)])
    _, expected = served(direct, 150)
    _, got = served(detour, 150)
    assert all(map(np.array_equal, got, expected))


def test_a_change_drains_the_group_that_is_begun_before_the_next() -> None:
    source, T, K, group = WindowSource(20 * 60 + 1, 60), 4, 5, 5 * 15
    before = order_of(source, [(0, T)], K)
    after = order_of(source, [(0, T), (100, 6)], K)
    left = np.concatenate(served(before, 2 * group, first=100)[1])
    drained = np.concatenate(served(after, 100 + -(-50 * T // 6), first=100)[1])
    assert np.array_equal(drained, left)  # the old samples' order
    _, rest = served(after, 100 + 34 + 100, first=100 + 34)
    assert {len(sample) for sample in rest} == {6}
    assert not set(np.concatenate(rest) // 60) & set(np.concatenate(served(before, 150)[1]) // 60)


def test_a_change_between_groups_drains_nothing() -> None:
    source, K, group = WindowSource(20 * 60 + 1, 60), 5, 5 * 15
    changed = order_of(source, [(0, 4), (group, 6)], K)
    alone = order_of(source, [(0, 6)], K)
    got, expected = served(changed, 4 * 50, group)[1], served(alone, 4 * 50, 50)[1]
    assert all(map(np.array_equal, got, expected))


@pytest.mark.parametrize("changed", [False, True])
def test_reading_stays_within_a_group(changed: bool) -> None:
    W, T, K, blocks = 50, 4, 4, 21
    order = order_of(WindowSource((W * blocks - 13) * T + 1, W * T), [(0, T), (333, 8)] if changed else [(0, T)], K)
    end = order.end_of(1)
    _, tokens = served(order, end)
    seen = [set((sample // (W * T)).tolist()) for sample in tokens]
    last = {block: number for number, of_sample in enumerate(seen) for block in of_sample}
    first = {block: number for number, of_sample in reversed(list(enumerate(seen))) for block in of_sample}
    open_at_once = [sum(first[b] <= i <= last[b] for b in range(blocks)) for i in range(end)]
    assert max(open_at_once) <= 2 * K - 1  # at a group's end, its last samples and no others of the next
    assert max(last[b] - first[b] for b in range(blocks)) < K * W


def test_blocks_fall_on_groups_uniformly() -> None:
    blocks, K, epochs, T = 24, 4, 500, 4
    order = order_of(WindowSource(blocks * T + 1, T), [(0, T)], K)  # one sample a block
    place = np.empty((epochs, blocks), dtype=np.int64)
    file_place = file_places(order, epochs * blocks).reshape(epochs, blocks) // T
    np.put_along_axis(place, file_place, np.broadcast_to(np.arange(blocks), place.shape), axis=1)
    for cells in (place // K, place % K):  # which group a block falls on, and its turn within that
        counts = np.stack([np.bincount(cells[:, block]) for block in range(blocks)])
        expected = epochs / counts.shape[1]
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        degrees = (blocks - 1) * (counts.shape[1] - 1)
        assert abs(chi_squared - degrees) < 4 * np.sqrt(2 * degrees)


def test_samples_of_a_group_are_served_uniformly() -> None:
    """Over many epochs each window of a block comes at each place of the group equally often."""
    W, K, T, epochs = 8, 3, 2, 800
    order = order_of(WindowSource(W * K * T + 1, W * T), [(0, T)], K)
    window = file_places(order, epochs * W * K).reshape(epochs, W * K) // T
    counts = np.stack([np.bincount(window[:, place], minlength=W * K) for place in range(W * K)])
    expected = epochs / (W * K)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    degrees = (W * K - 1) ** 2
    assert abs(chi_squared - degrees) < 4 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("changes", [[(0, 4)], [(0, 4), (20_000, 8), (25_000, 5)]])
def test_no_correlation_with_the_file_beyond_the_block(changes: list[tuple[int, int]]) -> None:
    W, T, K, blocks = 100, 4, 8, 640
    order = order_of(WindowSource(blocks * W * T + 1, W * T), changes, K)
    end = order.end_of(1)
    places = np.array([sample[0] for sample in served(order, end)[1]])
    # Spearman's: a whole block moves at once, so that only blocks are independent.
    ranks = np.argsort(np.argsort(places))
    assert abs(np.corrcoef(ranks, np.arange(end))[0, 1]) < 4 / np.sqrt(blocks)
    # Within the block, every sample is.
    within = places % (W * T)
    assert abs(np.corrcoef(within, np.arange(end))[0, 1]) < 4 / np.sqrt(end)
    assert abs(np.corrcoef(within[1:], within[:-1])[0, 1]) < 4 / np.sqrt(end)
    # Neighbours in the order are of one block as often as K blocks allow, and no neighbours in the file.
    block = places // (W * T)
    assert np.mean(block[1:] == block[:-1]) == pytest.approx(1 / K, abs=0.02)
    assert np.mean(np.abs(np.diff(places)) <= 8) < 3 * 2 / (K * W)


def test_ten_trillion_tokens_take_megabytes() -> None:
    source = WindowSource(10**13, 1 << 25)
    tracemalloc.start()
    order = order_of(source, [(0, 4096), (123_456_789, 8192)], K=8)
    order.pick(np.array([123_456_788, 123_456_790, order.end_of(3)]))
    assert order.consumed_before(order.end_of(2)) == (2 * (10**13 - 1), 2.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6


def test_sources_without_data_and_packs_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="source 'a', which has no data"):
        order_of(WindowSource(1, 12), [(0, 4)])

    class Repacked(WindowSource):
        def cut(self, sequence_length: int) -> object:
            return WindowSource(self.tokens, 16 * sequence_length).cut(sequence_length)

    with pytest.raises(ValueError, match="'a' was packed for 4 and for 8 tokens with different shuffle blocks"):
        order_of(Repacked(1000, 0), [(0, 4), (5, 8)])
