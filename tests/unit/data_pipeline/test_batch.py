import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_pipeline.batch import make_batch

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
