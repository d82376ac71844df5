"""Stages at any position, caps, sources that come and go: what is served, and what has been consumed."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import MIXTURE_BLOCK
from data_pipeline.order import Consumed, SampleOrder, Stage
from data_pipeline.samples import Samples
from tests.unit.data_pipeline.ordered_sources import (
    MIXED,
    SOURCES,
    WEIGHTS,
    WINDOWS,
    DocumentSource,
    T,
    W,
    WindowSource,
    arrays,
    order,
    served,
    tokens_of,
)

STARTS = st.lists(st.integers(1, 12_000), min_size=1, max_size=3, unique=True).map(sorted)
MIXTURES = st.dictionaries(st.sampled_from("abc"), st.floats(0.1, 10), min_size=1)


@settings(max_examples=30)
@given(starts=STARTS, mixtures=st.lists(MIXTURES, min_size=4, max_size=4))
@example(starts=[1, 2, 4097], mixtures=[{"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 1.0}, {"c": 1.0}])
def test_a_mixture_anywhere_repeats_and_loses_nothing(starts: list[int], mixtures: list[dict[str, float]]) -> None:
    """Whatever the mixtures, each source serves the very sequence that it serves alone."""
    stages = [Stage(start, weights, T) for start, weights in zip([0, *starts], mixtures, strict=False)]
    staged, end = order(stages), starts[-1] + 5000
    got = served(staged, end)
    named = {name for stage in stages for name in stage.weights}
    consumed = {name: counted.samples for name, counted in staged.consumed_before(end).items()}
    assert consumed == {name: len(got[name]) for name in named}
    for name, samples in got.items():
        alone = order([Stage(0, {name: 1.0}, T)], {name: SOURCES[name]})
        assert samples == served(alone, len(samples))[name]


LENGTHS = st.lists(st.integers(1, 9), min_size=4, max_size=4)
SMALL = {
    "a": WindowSource(8000, 300),
    "b": DocumentSource(tuple(tuple(1 + (7 * i + j) % 13 for j in range(40)) for i in range(9))),
    "c": WindowSource(1234, 90),
}


@settings(max_examples=50)
@given(starts=STARTS, mixtures=st.lists(MIXTURES, min_size=4, max_size=4), lengths=LENGTHS, caps=MIXTURES)
def test_stages_lengths_and_caps_at_any_position(
    starts: list[int], mixtures: list[dict[str, float]], lengths: list[int], caps: dict[str, float]
) -> None:
    """No token twice in a source's epoch, no epoch begun before the last is whole, and consumption is what it was."""
    max_epochs = {name: round(cap) + 1 for name, cap in caps.items()}
    stages = [Stage(*stage, max_epochs) for stage in zip([0, *starts], mixtures, lengths, strict=False)]
    staged = SampleOrder(SMALL, 3, 1, stages)
    end = min([starts[-1] + 3000, *(stage.start for stage in staged.stages if not stage.weights)])
    picked = staged.samples(np.arange(end))
    consumed = staged.consumed_before(end)
    stage_of = np.searchsorted(starts, np.arange(end), side="right")
    assert [staged.sequence_length_at(position) for position in (0, *starts)] == lengths[: len(starts) + 1]
    for place, name in enumerate(staged.sources):
        at = np.flatnonzero(picked.source == place)
        if not len(at):
            assert consumed.get(name, Consumed(0, 0, 0.0)) == Consumed(0, 0, 0.0)
            continue
        sizes, tokens = [], []
        for cut in np.unique(picked.cut[at]):
            extents = staged.extents(place, cut, picked.number[at[picked.cut[at] == cut]])
            sizes.append(extents.tokens)
            tokens.append(tokens_of(extents))
        # Cuts ascend except where a leftover comes before its groups: put the tokens in the order served.
        sizes_at = np.empty(len(at), dtype=np.int64)
        for cut, counts in zip(np.unique(picked.cut[at]), sizes, strict=True):
            sizes_at[picked.cut[at] == cut] = counts
        assert np.all(sizes_at <= np.array(lengths)[stage_of[at]])
        epoch = picked.epoch[at]
        assert np.all(np.diff(epoch) >= 0)
        assert epoch[-1] < max_epochs.get(name, 10**9)
        inputs = SMALL[name].tokens - (not SMALL[name].whole)
        assert np.array_equal(np.bincount(epoch, sizes_at)[:-1], np.full(epoch[-1], inputs))
        together = Counter(np.concatenate(tokens).tolist())
        assert set(together.values()) <= {epoch[-1], epoch[-1] + 1}
        assert consumed[name].samples == len(at)
        assert consumed[name].tokens == sizes_at.sum()
        assert consumed[name].epochs == pytest.approx(sizes_at.sum() / inputs)


def test_a_source_leaves_after_its_last_epoch_and_the_others_share_its_weight() -> None:
    capped = order([Stage(0, WEIGHTS, T, {"c": 2, "a": 1})])
    first, without_c, without_a = capped.stages
    assert capped.ends_at is None
    assert first == Stage(0, WEIGHTS, T, {"c": 2, "a": 1})
    assert (without_c.weights, without_a.weights) == ({"a": 0.7, "b": 0.2}, {"b": 0.2})
    picked = capped.samples(np.arange(30_000))
    assert np.flatnonzero(picked.source == 2)[-1] + 1 == without_c.start
    assert np.sum(picked.source == 2) == 2 * WINDOWS["c"]
    assert np.flatnonzero(picked.source == 0)[-1] + 1 == without_a.start
    assert np.sum(picked.source == 0) == WINDOWS["a"]
    counts = np.bincount(picked.source[without_c.start :][:MIXTURE_BLOCK])
    assert counts.tolist() == [3186, 910]
    assert capped.consumed_before(without_c.start)["c"] == Consumed(602, 602 * T, 2.0)
    assert capped.consumed_before(30_000)["c"] == Consumed(602, 602 * T, 2.0)
    assert order([*capped.stages]).stages == capped.stages  # recorded as they came, they are the same order


def test_nothing_is_left() -> None:
    ended = order([Stage(0, {"c": 1.0, "b": 1.0}, T, {"b": 1, "c": 1}), Stage(9000, {"a": 1.0}, T)])
    total = WINDOWS["b"] + WINDOWS["c"]
    assert ended.ends_at == total
    assert ended.stages[-2:] == (Stage(total, {}, T, {"b": 1, "c": 1}), Stage(9000, {"a": 1.0}, T))
    assert not np.any(ended.samples(np.arange(total)).epoch)
    for positions in ([total], [0, 8999], [total + 7]):
        with pytest.raises(
            ValueError, match=f"position {positions[-1]} has no sample: at position {total} all sources"
        ):
            ended.samples(np.array(positions))
    assert ended.consumed_before(8999)["c"] == Consumed(301, 301 * T, 1.0)
    assert ended.samples(np.array([9000])).source.tolist() == [0]


def test_a_cap_that_is_raised_later_changes_nothing_before() -> None:
    once = Stage(0, WEIGHTS, T, {"c": 1})
    end = order([once]).stages[1].start
    raised = order([once, replace(once, start=end + 500, max_epochs={"c": 3})])
    assert np.array_equal(arrays(raised, np.arange(end + 500)), arrays(order([once]), np.arange(end + 500)))
    later = served(raised, end + 20_000)["c"]
    assert [epoch for epoch, _, _ in later] == [0] * 301 + [1] * 301 + [2] * 301


def test_a_source_that_is_at_its_end_has_no_part_in_a_later_stage() -> None:
    stages = [Stage(0, {"c": 1.0, "a": 1.0}, T, {"c": 1}), Stage(5000, WEIGHTS, T, {"c": 1})]
    assert order(stages).stages[-1].weights == {"a": 0.7, "b": 0.2}


def test_consumption_at_every_kind_of_position() -> None:
    stages = [Stage(0, WEIGHTS, T, {"c": 2}), Stage(5000, {"b": 1.0, "c": 1.0}, T, {"c": 4})]
    staged = order(stages)
    source = staged.samples(np.arange(20_000)).source
    edges = [stage.start for stage in staged.stages]
    for position in (0, 1, 4096, 4999, 5000, 5001, 5000 + 4096, 19_999, *edges, *(edge + 1 for edge in edges)):
        counts = Counter(staged.sources[i] for i in source[:position].tolist())
        assert {name: c.samples for name, c in staged.consumed_before(position).items() if c.samples} == counts


def test_a_source_added_later_changes_nothing_before() -> None:
    only_b = Stage(0, {"b": 1.0}, T)
    before = order([only_b], {"b": SOURCES["b"]})
    after = order([only_b, Stage(3000, WEIGHTS, T)])
    assert served(before, 3000)["b"] == served(after, 3000)["b"]
    assert after.consumed_before(3000).keys() == {"b"}
    assert after.consumed_before(3001).keys() == {"a", "b", "c"}


def test_a_source_removed_later_is_needed_only_where_it_served() -> None:
    stages = [*MIXED, Stage(3001, {"a": 1.0}, T)]
    kept, removed = order(stages), order(stages, {"a": SOURCES["a"]})
    positions = np.arange(3001, 9000)
    assert np.array_equal(kept.samples(positions).number, removed.samples(positions).number)
    assert removed.consumed_before(9000)["a"] == kept.consumed_before(9000)["a"]
    samples = kept.consumed_before(9000)["b"].samples
    assert removed.consumed_before(9000)["b"] == Consumed(samples, None, None)
    with pytest.raises(ValueError, match="is not among data.sources now"):
        removed.samples(np.arange(100))
    capped = [Stage(0, WEIGHTS, T, {"b": 1}), Stage(3001, {"a": 1.0}, T)]
    with pytest.raises(ValueError, match="'b' was to be read 1 times at most, but is not among data.sources now: keep"):
        order(capped, {"a": SOURCES["a"]})


def test_a_length_is_asked_only_of_sources_that_serve_it() -> None:
    class Packed(WindowSource):
        def cut(self, sequence_length: int) -> Samples:
            if sequence_length != T:
                raise ValueError(f"not packed for {sequence_length} tokens")
            return super().cut(sequence_length)

    sources = SOURCES | {"a": Packed(SOURCES["a"].tokens, W * T)}
    order([*MIXED, Stage(100, {"b": 1.0}, 8), Stage(200, WEIGHTS, T)], sources)
    with pytest.raises(ValueError, match="not packed for 8 tokens"):
        order([*MIXED, Stage(100, WEIGHTS, 8)], sources)
