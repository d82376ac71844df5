import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_pipeline.batch import Batch, join_extents, make_batch

BOS, EOS = 1, 2
WINDOWS = hnp.arrays(np.uint16, st.tuples(st.integers(1, 4), st.integers(2, 20)), elements=st.integers(1, 5))


def test_without_mask_every_token_has_a_target() -> None:
    windows = np.array([[7, EOS, BOS, 8, 9]], dtype=np.uint16)
    batch = make_batch(windows, BOS, EOS, document_mask=False)
    assert batch.tokens.tolist() == [[7, EOS, BOS, 8]]
    assert batch.targets.tolist() == [[EOS, BOS, 8, 9]]
    assert batch.positions is None
    assert batch.document_ids is None
    assert batch.valid_tokens == 4


def test_with_mask_documents_are_kept_apart() -> None:
    windows = np.array([[7, 6, EOS, BOS, 8, EOS, BOS], [BOS, 5, 6, 7, EOS, BOS, EOS]], dtype=np.uint16)
    batch = make_batch(windows, BOS, EOS, document_mask=True)
    assert batch.targets.tolist() == [[6, EOS, -100, 8, EOS, -100], [5, 6, 7, EOS, -100, EOS]]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]]
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]]
    assert batch.valid_tokens == 9


def test_a_tokenizer_without_bos_starts_documents_after_eos() -> None:
    windows = np.array([[7, EOS, 8, 9, EOS], [EOS, 5, 6, 7, 8]], dtype=np.uint16)
    batch = make_batch(windows, None, EOS, document_mask=True)
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]]
    assert batch.targets.tolist() == [[EOS, -100, 9, EOS], [-100, 6, 7, 8]]


@given(WINDOWS)
def test_mask_against_a_loop(windows: np.ndarray) -> None:
    batch = make_batch(windows, BOS, EOS, document_mask=True)
    assert batch.positions is not None
    assert batch.document_ids is not None
    for row, (tokens, following) in enumerate(zip(windows[:, :-1].tolist(), windows[:, 1:].tolist(), strict=True)):
        position, document = -1, 0
        for t, token in enumerate(tokens):
            if token == BOS and t > 0:
                position, document = -1, document + 1
            position += 1
            assert batch.positions[row, t] == position
            assert batch.document_ids[row, t] == document
            assert batch.targets[row, t] == (-100 if token == EOS else following[t])


@given(WINDOWS, st.booleans())
def test_torch_takes_the_arrays_as_they_are(windows: np.ndarray, document_mask: bool) -> None:
    batch = make_batch(windows, BOS, EOS, document_mask)
    for array in (batch.tokens, batch.targets, batch.positions, batch.document_ids):
        if array is not None:
            assert array.flags.c_contiguous
            assert array.flags.writeable
            assert array.shape == (windows.shape[0], windows.shape[1] - 1)
            assert torch.from_numpy(array).dtype == torch.int64


def join(rows: list[list[list[int]]], T: int, mask: bool = False, whole: bool = False, bos: int | None = BOS) -> Batch:
    """A batch of rows of extents, each given with the token that follows it."""
    extents = [extent for row in rows for extent in row]
    tokens = np.array([token for extent in extents for token in extent], dtype=np.uint16)
    counts = np.array([len(extent) - 1 for extent in extents], dtype=np.int64)
    first = np.cumsum([0, *map(len, rows)])
    return join_extents(tokens, counts, first, T, bos, EOS, mask, whole)


def test_whole_documents_without_mask() -> None:
    # Two documents and padding; a document's end and a whole one; a piece of a long document.
    rows = [[[BOS, 7, EOS, BOS], [BOS, 8, EOS, 9]], [[5, EOS, BOS], [BOS, 6, 6, EOS, BOS]], [[4, 4, 4, 4, 4, 4, 5]]]
    batch = join(rows, T=6, whole=True)
    assert batch.tokens.tolist() == [[1, 7, 2, 1, 8, 2], [5, 2, 1, 6, 6, 2], [4] * 6]
    assert batch.targets.tolist() == [[7, 2, 1, 8, 2, -100], [2, 1, 6, 6, 2, -100], [4, 4, 4, 4, 4, 5]]
    assert batch.positions is None
    assert batch.document_ids is None


def test_whole_documents_with_mask_and_padding() -> None:
    batch = join([[[BOS, 7, EOS, BOS], [6, 8, 9]], [[BOS, EOS, BOS]]], T=7, mask=True, whole=True)
    assert batch.tokens.tolist() == [[1, 7, 2, 6, 8, 2, 2], [1, 2, 2, 2, 2, 2, 2]]
    assert batch.targets.tolist() == [[7, 2, -100, 8, 9, -100, -100], [2] + [-100] * 6]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4]]
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1, 1]]


def test_a_short_window_and_an_empty_row() -> None:
    batch = join([[[7, 8, EOS, BOS]], []], T=5)
    assert batch.tokens.tolist() == [[7, 8, 2, 2, 2], [2] * 5]
    assert batch.targets.tolist() == [[8, 2, 1, -100, -100], [-100] * 5]
    masked = join([[]], T=3, mask=True)
    assert masked.targets.tolist() == [[-100] * 3]
    assert masked.document_ids is not None
    assert masked.document_ids.tolist() == [[0] * 3]


def test_windows_that_were_regrouped_keep_the_streams_targets() -> None:
    batch = join([[[7, 8, 9], [5, EOS, 6], [4, 3]]], T=5)
    assert batch.targets.tolist() == [[8, 9, EOS, 4, 3]]


EXTENTS = st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=7), max_size=4)


@given(st.lists(EXTENTS, min_size=1, max_size=4), st.integers(0, 3), st.booleans(), st.booleans(), st.booleans())
def test_extents_against_a_loop(
    rows: list[list[list[int]]], padding: int, mask: bool, whole: bool, has_bos: bool
) -> None:
    T = max(1, padding + max(sum(len(extent) - 1 for extent in row) for row in rows))
    batch = join(rows, T, mask, whole, BOS if has_bos else None)
    for b, row in enumerate(rows):
        expected: list[tuple[int, int, int, int]] = []
        position, document = -1, -1
        for e, extent in enumerate(row):
            for i, token in enumerate(extent[:-1]):
                begins = token == BOS if has_bos else bool(expected) and expected[-1][0] == EOS
                if i == 0 or begins:
                    position, document = -1, document + 1
                position += 1
                target = extent[i + 1]
                if token == EOS and mask:
                    target = -100
                elif token == EOS and i == len(extent) - 2:
                    if e + 1 < len(row):
                        target = row[e + 1][0]
                    elif whole:
                        target = -100
                expected.append((token, target, position, document))
        content = len(expected)
        expected += [(EOS, -100, i, document + 1) for i in range(T - content)]
        assert batch.tokens[b].tolist() == [of[0] for of in expected]
        assert batch.targets[b].tolist() == [of[1] for of in expected]
        if mask:
            assert batch.positions is not None
            assert batch.document_ids is not None
            assert batch.positions[b].tolist() == [of[2] for of in expected]
            assert batch.document_ids[b].tolist() == [of[3] for of in expected]


@given(WINDOWS, st.booleans(), st.booleans())
def test_full_windows_take_the_short_way_to_the_same_batch(windows: np.ndarray, mask: bool, whole: bool) -> None:
    rows = [[window.tolist()] for window in windows]
    T = windows.shape[1] - 1
    short, long = join(rows, T, mask, whole), join([*rows, []], T, mask, whole)
    for name in ("tokens", "targets", "positions", "document_ids"):
        one, other = getattr(short, name), getattr(long, name)
        assert one is other is None or np.array_equal(one, other[:-1])


@pytest.mark.parametrize("mask", [False, True])
def test_torch_takes_joined_arrays_as_they_are(mask: bool) -> None:
    batch = join([[[BOS, 7, EOS, BOS], [6, 8, 9]], []], T=8, mask=mask)
    for array in (batch.tokens, batch.targets, batch.positions, batch.document_ids):
        if array is not None:
            assert array.flags.c_contiguous
            assert array.flags.writeable
            assert torch.from_numpy(array).dtype == torch.int64
