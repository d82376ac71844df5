"""Windows of documents and batches of windows: each target once, each batch within its budget, little padding."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.batch import IGNORED_TARGET
from pretrain.evaluation.windows import Window, Windowing, document_windows, packed, padded


def test_defaults_are_the_training_length_side_by_side() -> None:
    assert Windowing.of(64) == Windowing(window=64, stride=64, batch_tokens=8192)
    assert Windowing.of(64, window=100_000) == Windowing(100_000, 100_000, 100_000)
    assert Windowing.of(64, window="document") == Windowing(None, None, 8192)


@pytest.mark.parametrize(
    ("window", "stride", "batch_tokens", "message"),
    [
        (0, 0, 10, "window=0"),
        (8, 9, 10, "stride=9 must lie between 1 and window=8"),
        (8, 0, 10, "stride=0"),
        (8, None, 10, "stride=None"),
        (8, 8, 7, "batch_tokens=7 does not hold one window=8"),
        (None, 8, 8, "stride=8: a document that is read at once has none"),
        (None, None, 0, "batch_tokens=0"),
    ],
)
def test_impossible_windows_are_refused(
    window: int | None, stride: int | None, batch_tokens: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Windowing(window, stride, batch_tokens)


@given(n=st.integers(0, 60), window=st.integers(1, 40), data=st.data(), eos=st.sampled_from([None, 2]))
def test_each_target_counts_once(n: int, window: int, data: st.DataObject, eos: int | None) -> None:
    stride = data.draw(st.integers(1, window))
    ids = np.arange(10, 10 + n)
    sequence = [1, *ids.tolist(), *([] if eos is None else [eos])]
    counted: list[int] = []
    for number, row in enumerate(document_windows(ids, 1, eos, Windowing(window, stride, window), document=7)):
        assert (row.begin, row.document) == (number * stride, 7)
        assert row.inputs.tolist() == sequence[:-1][row.begin : row.begin + window]
        kept = row.targets != IGNORED_TARGET
        assert row.targets[kept].tolist() == np.array(sequence[1:])[row.begin : row.begin + window][kept].tolist()
        if number:
            assert np.flatnonzero(kept)[0] >= window - stride  # what a stride below the window buys
        counted += row.targets[kept].tolist()
    assert counted == sequence[1:]


def test_a_whole_document_is_one_window() -> None:
    (row,) = document_windows(np.arange(10, 30), 1, 2, Windowing(None, None, 4))
    assert row.inputs.tolist() == [1, *range(10, 30)]
    assert row.targets.tolist() == [*range(10, 30), 2]


def rows_of(lengths: list[int]) -> list[Window]:
    return [Window(np.full(length, at), np.full(length, at), document=at) for at, length in enumerate(lengths)]


@given(lengths=st.lists(st.integers(0, 50), max_size=60), budget=st.integers(50, 120))
def test_batches_hold_every_window_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(packed(rows_of(lengths), budget))
    assert sorted(row.document for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(map(len, batch)) <= budget for batch in batches)


def test_a_window_that_is_longer_than_the_budget_is_alone() -> None:
    assert [list(map(len, batch)) for batch in packed(rows_of([3, 40, 3, 3, 11]), 10)] == [[40], [11], [3, 3, 3]]


def test_batches_of_like_length_pad_little() -> None:
    lengths = np.random.default_rng(0).integers(1, 512, size=2000).tolist()
    padded_tokens = sum(len(batch) * max(map(len, batch)) for batch in packed(rows_of(lengths), 8192))
    assert padded_tokens < 1.08 * sum(lengths)


def test_a_small_corpus_is_not_padded_to_its_longest_window() -> None:
    lengths = [512] * 18 + [170] * 6 + list(range(100, 10, -2))
    batches = [[len(row) for row in batch] for batch in packed(rows_of(lengths), 8192)]
    padded_tokens = sum(len(batch) * batch[0] for batch in batches)
    assert padded_tokens < 1.1 * sum(lengths)
    # Nor cut into slivers: what is left over beside whole batches is at least an eighth of the budget.
    assert all(len(batch) * batch[0] > 8192 / 8 - batch[0] for batch in batches[:-1])


def test_packing_reads_a_bounded_part_of_an_endless_corpus() -> None:
    taken = 0

    def endless() -> Iterator[Window]:
        nonlocal taken
        while True:
            taken += 1
            yield Window(np.zeros(10), np.zeros(10))

    batches = packed(endless(), 100)
    for _ in range(3):
        assert len(next(batches)) == 10
    assert taken <= 16 * 10


def test_padding_is_on_the_right_and_never_counts() -> None:
    inputs_BT, targets_BT = padded([Window(np.array([1, 5]), np.array([5, 2])), Window(np.array([]), np.array([]))])
    assert inputs_BT.tolist() == [[1, 5], [0, 0]]
    assert targets_BT.tolist() == [[5, 2], [IGNORED_TARGET] * 2]
    inputs_BT, targets_BT = padded([Window(np.array([]), np.array([]))])
    assert (inputs_BT.tolist(), targets_BT.tolist()) == ([[0]], [[IGNORED_TARGET]])
