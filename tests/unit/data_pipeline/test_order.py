"""The order as a pure function of the position, whoever asks for how much of it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import MIXTURE_BLOCK
from data_pipeline.order import Stage
from tests.unit.data_pipeline.ordered_sources import MIXED, SOURCES, WEIGHTS, T, W, WindowSource, arrays, order, served


def test_the_order_is_recorded() -> None:
    """Runs resume by this order: it must not change between versions, machines or numpys."""
    positions = np.array([0, 1, 2, 4095, 4096, 9999, 10_000, 123_456])
    source, epoch, _, number = arrays(order([*MIXED, Stage(10_000, {"b": 1.0, "c": 1.0}, T)]), positions).tolist()
    assert source == [2, 0, 0, 0, 0, 0, 2, 2]
    assert epoch == [0, 0, 0, 0, 0, 0, 3, 191]
    assert number == [254, 3537, 4669, 843, 8458, 1316, 135, 46]


def test_the_order_with_other_lengths_and_a_cap_is_recorded() -> None:
    stages = [Stage(0, WEIGHTS, T, {"c": 2}), Stage(5000, WEIGHTS, 7, {"c": 2}), Stage(8000, WEIGHTS, T, {"c": 2})]
    recorded = order(stages)
    positions = np.array([4999, 5000, 5001, 5300, 7999, 8000, 8003, 8500, 20_000])
    got = arrays(recorded, positions).tolist()
    places = [recorded.extents(s, c, np.array([n])).start[0] for s, _, c, n in zip(*got, strict=True)]
    assert [stage.start for stage in recorded.stages] == [0, 5000, 5594, 8000]
    assert got == [
        [0, 0, 2, 1, 1, 0, 1, 0, 0],
        [0, 0, 1, 0, 0, 0, 0, 0, 1],
        [0, 3, 3, 3, 2, 5, 5, 4, 4],
        [6523, 0, 0, 58, 321, 0, 1, 377, 2421],
    ]
    assert places == [26092, 20552, 444, 3150, 2217, 11740, 2340, 1508, 9684]


@settings(max_examples=20)
@given(st.lists(st.integers(0, 20_000), min_size=1, max_size=200))
def test_random_access_equals_sequential(positions: list[int]) -> None:
    stages = [Stage(0, WEIGHTS, T, {"c": 3}), Stage(5_001, {"b": 1.0, "c": 3.0}, 2 * T)]
    everything = arrays(order(stages), np.arange(20_001))
    assert np.array_equal(arrays(order(stages), np.array(positions)), everything[:, positions])


@settings(max_examples=30)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=10))
def test_any_split_into_batches_is_the_same(batches: list[int]) -> None:
    stages = [*MIXED, Stage(1234, WEIGHTS, 3)]
    total = sum(batches)
    cuts = np.cumsum([0, *batches])
    parts = [arrays(order(stages), np.arange(a, b)) for a, b in itertools.pairwise(cuts)]
    assert np.array_equal(arrays(order(stages), np.arange(total)), np.concatenate(parts, axis=1))


@given(begin=st.integers(0, 8000), steps=st.integers(1, 3), layout=st.sampled_from([(1, 24), (2, 12), (3, 8), (24, 1)]))
@settings(max_examples=30)
def test_the_ranks_together_read_the_batch_whatever_their_number(
    begin: int, steps: int, layout: tuple[int, int]
) -> None:
    staged = order([*MIXED, Stage(4000, WEIGHTS, 3)])
    ranks, share = layout
    for step in range(steps):
        batch = begin + 24 * step
        parts = [arrays(staged, batch + rank * share + np.arange(share)) for rank in range(ranks)]
        assert np.array_equal(np.concatenate(parts, axis=1), arrays(order(staged.stages), batch + np.arange(24)))


def test_every_mixture_block_has_the_exact_share() -> None:
    mixed = order([Stage(0, {"a": 1.0}, T), Stage(1234, WEIGHTS, T), Stage(1234 + 3 * MIXTURE_BLOCK, WEIGHTS, 5)])
    for block in range(6):
        first = 1234 + block * MIXTURE_BLOCK
        counts = np.bincount(mixed.samples(np.arange(first, first + MIXTURE_BLOCK)).source)
        assert counts.tolist() == [2867, 819, 410]
        assert np.abs(counts / MIXTURE_BLOCK - [0.7, 0.2, 0.1]).max() < 1 / MIXTURE_BLOCK


def test_the_order_of_naming_does_not_matter() -> None:
    turned = order([Stage(0, dict(reversed(WEIGHTS.items())), T)], dict(reversed(SOURCES.items())))
    assert served(order(), 9000) == served(turned, 9000)


def test_seeds_epochs_and_sources_differ() -> None:
    n = 1000
    sources = {name: WindowSource(n * T + 1, 50 * T) for name in ("a", "b")}
    sequences = []
    for seed in (0, 1):
        for samples in served(order([Stage(0, {"a": 1.0, "b": 1.0}, T)], sources, seed), 4 * n).values():
            sequences += [[number for e, _, number in samples if e == epoch][:900] for epoch in (0, 1)]
    for i, left in enumerate(sequences):
        for right in sequences[:i]:
            assert np.mean(np.equal(left, right)) < 0.02
            assert abs(np.corrcoef(left, right)[0, 1]) < 0.35  # only blocks of 50 are independent: 20 of them


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "first must start at 0"),
        ([Stage(5, WEIGHTS, T)], "first must start at 0"),
        ([*MIXED, Stage(9, WEIGHTS, T), Stage(9, WEIGHTS, T)], "each later than the last"),
        ([Stage(0, {}, T)], "no source"),
        ([Stage(0, {"z": 1.0}, T)], "'z', which is not among data.sources"),
        ([Stage(0, {"empty": 1.0}, T)], "'empty', which has no data"),
        ([Stage(0, {"a": -1.0}, T)], "weights must be positive"),
        ([Stage(0, {"a": 1.0, "b": 1e-5}, T)], "'b' has 1e-05 of the mixture"),
        ([Stage(0, WEIGHTS, W * T + 1)], "shorter than the sequence length 401"),
    ],
)
def test_unusable_stages(stages: list[Stage], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        order(stages, SOURCES | {"empty": WindowSource(0, W * T)})
