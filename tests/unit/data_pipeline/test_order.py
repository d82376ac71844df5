import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.order import MIXTURE_BLOCK, SampleOrder, Stage, shares

SIZES = {"a": 9001, "b": 5000, "c": 301}
WEIGHTS = {"a": 0.7, "b": 0.2, "c": 0.1}


def order(
    sizes: dict[str, int] = SIZES, stages: list[Stage] | None = None, W: int = 100, K: int = 4, seed: int = 7
) -> SampleOrder:
    return SampleOrder(sizes, W, K, seed, stages or [Stage(0, WEIGHTS)])


def served(source_order: SampleOrder, positions: np.ndarray) -> dict[str, list[tuple[int, int]]]:
    """(epoch, window) of each source, in the order served."""
    source, epoch, sample = source_order.samples(positions)
    return {
        name: list(zip(epoch[source == i].tolist(), sample[source == i].tolist(), strict=True))
        for i, name in enumerate(source_order.sources)
    }


@settings(deadline=None)
@given(windows=st.integers(1, 700), W=st.integers(1, 60), K=st.integers(1, 9), seed=st.integers(0, 10))
@example(windows=1, W=1, K=1, seed=0)
@example(windows=120, W=60, K=2, seed=0)
@example(windows=121, W=60, K=2, seed=0)
def test_each_epoch_visits_every_window_once(windows: int, W: int, K: int, seed: int) -> None:
    one = order({"a": windows}, [Stage(0, {"a": 1.0})], W, K, seed)
    source, epoch, sample = one.samples(np.arange(3 * windows))
    assert not source.any()
    assert np.array_equal(epoch, np.repeat([0, 1, 2], windows))
    for number in range(3):
        assert np.array_equal(np.sort(sample[epoch == number]), np.arange(windows))


def test_reading_stays_within_a_group() -> None:
    W, K, blocks = 50, 4, 21
    windows = W * blocks - 13
    _, _, sample = order({"a": windows}, [Stage(0, {"a": 1.0})], W, K).samples(np.arange(windows))
    block = sample // W
    # Cut the epoch where the set of blocks turns over: K blocks a group, each block in one group only.
    groups = np.array([len(np.unique(block[i : i + K * W // 2])) for i in range(0, windows - K * W, K * W)])
    assert groups.max() <= K
    last_seen = {b: np.flatnonzero(block == b) for b in range(blocks)}
    assert max(int(seen[-1] - seen[0]) for seen in last_seen.values()) < K * W


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 20_000), min_size=1, max_size=200))
def test_random_access_equals_sequential(positions: list[int]) -> None:
    stages = [Stage(0, WEIGHTS), Stage(5_001, {"b": 1.0, "c": 3.0})]
    everything = np.stack(order(stages=stages).samples(np.arange(20_001)))
    some = np.stack(order(stages=stages).samples(np.array(positions)))
    assert np.array_equal(some, everything[:, positions])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=10))
def test_any_split_into_batches_is_the_same(batches: list[int]) -> None:
    total = sum(batches)
    cuts = np.cumsum([0, *batches])
    whole = np.stack(order().samples(np.arange(total)))
    parts = [np.stack(order().samples(np.arange(a, b))) for a, b in itertools.pairwise(cuts)]
    assert np.array_equal(whole, np.concatenate(parts, axis=1))


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(1, 100), min_size=1))
def test_shares_are_within_one_of_exact(weights: dict[str, float]) -> None:
    names = sorted(weights)
    counts = shares(weights, names)
    assert sum(counts) == MIXTURE_BLOCK
    total = sum(map(Fraction, weights.values()))
    for name, count in zip(names, counts, strict=True):
        assert abs(count - Fraction(weights[name]) / total * MIXTURE_BLOCK) < 1


def test_every_mixture_block_has_the_exact_share() -> None:
    stage_start = 1234
    mixed = order(stages=[Stage(0, {"a": 1.0}), Stage(stage_start, WEIGHTS)])
    for block in range(3):
        first = stage_start + block * MIXTURE_BLOCK
        source, _, _ = mixed.samples(np.arange(first, first + MIXTURE_BLOCK))
        counts = np.bincount(source)
        assert counts.tolist() == [2867, 819, 410]
        assert np.abs(counts / MIXTURE_BLOCK - [0.7, 0.2, 0.1]).max() < 1 / MIXTURE_BLOCK


STARTS = st.lists(st.integers(1, 12_000), min_size=1, max_size=3, unique=True).map(sorted)
MIXTURES = st.dictionaries(st.sampled_from("abc"), st.floats(0.1, 10), min_size=1)


@settings(deadline=None, max_examples=30)
@given(starts=STARTS, mixtures=st.lists(MIXTURES, min_size=4, max_size=4))
@example(starts=[1, 2, 4097], mixtures=[{"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 1.0}, {"c": 1.0}])
def test_a_stage_anywhere_repeats_and_loses_nothing(starts: list[int], mixtures: list[dict[str, float]]) -> None:
    """Whatever the stages, each source serves the very sequence that it serves alone."""
    stages = [Stage(start, weights) for start, weights in zip([0, *starts], mixtures, strict=False)]
    staged = order(stages=stages)
    end = starts[-1] + 5000
    got = served(staged, np.arange(end))
    assert staged.consumed_before(end) == {name: len(windows) for name, windows in got.items() if windows} | {
        name: 0 for stage in stages for name in stage.weights if not got[name]
    }
    for name, windows in got.items():
        alone = order({name: SIZES[name]}, [Stage(0, {name: 1.0})])
        assert windows == served(alone, np.arange(len(windows)))[name]


def test_consumption_at_every_kind_of_position() -> None:
    stages = [Stage(0, WEIGHTS), Stage(5000, {"b": 1.0, "c": 1.0})]
    staged = order(stages=stages)
    source, _, _ = staged.samples(np.arange(20_000))
    for position in (0, 1, 4096, 4999, 5000, 5001, 5000 + 4096, 19_999):
        counts = Counter(staged.sources[i] for i in source[:position].tolist())
        assert {name: n for name, n in staged.consumed_before(position).items() if n} == counts


def test_a_source_added_later_changes_nothing_before() -> None:
    before = order({"b": 5000}, [Stage(0, {"b": 1.0})])
    after = order({"a": 9001, "b": 5000, "c": 301}, [Stage(0, {"b": 1.0}), Stage(3000, WEIGHTS)])
    assert served(before, np.arange(3000))["b"] == served(after, np.arange(3000))["b"]


def test_a_source_removed_later_is_needed_only_where_it_served() -> None:
    stages = [Stage(0, WEIGHTS), Stage(3001, {"a": 1.0})]
    kept, removed = order(stages=stages), order({"a": 9001}, stages)
    positions = np.arange(3001, 9000)
    assert served(kept, positions)["a"] == served(removed, positions)["a"]
    with pytest.raises(ValueError, match="is not among data.sources now"):
        removed.samples(np.arange(100))


def test_the_order_of_naming_does_not_matter() -> None:
    turned = order(dict(reversed(SIZES.items())), [Stage(0, dict(reversed(WEIGHTS.items())))])
    assert served(order(), np.arange(9000)) == served(turned, np.arange(9000))


def test_seeds_epochs_and_sources_differ() -> None:
    n = 1000
    stages = [Stage(0, {"a": 1.0, "b": 1.0})]
    one, other = (order({"a": n, "b": n}, stages, 50, 4, seed) for seed in (0, 1))
    sequences = []
    for source_order in (one, other):
        for windows in served(source_order, np.arange(4 * n)).values():
            sequences += [[w for e, w in windows if e == epoch][:900] for epoch in (0, 1)]
    for i, left in enumerate(sequences):
        for right in sequences[:i]:
            assert np.mean(np.equal(left, right)) < 0.02
            assert abs(np.corrcoef(left, right)[0, 1]) < 0.35  # only blocks of 50 are independent: 20 of them


def test_the_shuffle_is_uniform_and_independent_of_the_file_order() -> None:
    n, W, K = 64_000, 100, 8
    _, _, sample = order({"a": n}, [Stage(0, {"a": 1.0})], W, K).samples(np.arange(n))
    assert abs(np.corrcoef(sample, np.arange(n))[0, 1]) < 5 / np.sqrt(n / W)
    # Within a group, windows are shuffled one by one: neighbours in the order are not neighbours in the file.
    assert np.mean(np.abs(np.diff(sample)) == 1) < 2 * 2 / (K * W)
    place_in_block = sample[: n // 2] % W
    counts = np.bincount(place_in_block, minlength=W)
    chi_squared = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_squared < W + 5 * np.sqrt(2 * W)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "first must start at 0"),
        ([Stage(5, WEIGHTS)], "first must start at 0"),
        ([Stage(0, WEIGHTS), Stage(9, WEIGHTS), Stage(9, WEIGHTS)], "each later than the last"),
        ([Stage(0, {})], "no source"),
        ([Stage(0, {"z": 1.0})], "'z', which is not among data.sources"),
        ([Stage(0, {"empty": 1.0})], "'empty', which has no full window"),
        ([Stage(0, {"a": 0.0})], "'a' is 0.0, but weights must be positive"),
        ([Stage(0, {"a": float("nan")})], "weights must be positive"),
        ([Stage(0, {"a": 1.0, "b": 1e-5})], "'b' has 1e-05 of the mixture"),
    ],
)
def test_unusable_stages(stages: list[Stage], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleOrder(SIZES | {"empty": 0}, 100, 4, 7, stages)


def test_the_order_is_recorded() -> None:
    """Runs resume by this order: it must not change between versions, machines or numpys."""
    positions = np.array([0, 1, 2, 4095, 4096, 9999, 10_000, 123_456])
    got = order(stages=[Stage(0, WEIGHTS), Stage(10_000, {"b": 1.0, "c": 1.0})]).samples(positions)
    assert [array.tolist() for array in got] == [
        [2, 0, 0, 0, 0, 0, 2, 2],
        [0, 0, 0, 0, 0, 0, 3, 191],
        [254, 3537, 4669, 843, 8458, 1316, 135, 46],
    ]
