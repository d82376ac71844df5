import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.packing import best_fit, pack_documents
from data_pipeline.samples import Extents

LENGTHS = st.lists(st.integers(1, 50), max_size=60)


def pack(lengths: list[int], T: int) -> Extents:
    count = np.array(lengths, dtype=np.int64)
    return pack_documents(np.cumsum(count) - count, count, T)


def documents_like_text(seed: int, count: int) -> np.ndarray:
    """Log-normal lengths: most short, some very long, as on the web."""
    return np.maximum(2, np.random.default_rng(seed).lognormal(6.0, 1.3, count)).astype(np.int64)


@given(LENGTHS, st.integers(1, 20))
def test_every_token_once_and_nothing_that_fits_is_cut(lengths: list[int], T: int) -> None:
    extents = pack(lengths, T)
    assert (extents.tokens <= T).all()
    tokens = [list(range(s, s + c)) for s, c in zip(extents.start.tolist(), extents.count.tolist(), strict=True)]
    assert sorted(itertools.chain(*tokens)) == list(range(sum(lengths)))
    pieces = set(zip(extents.start.tolist(), extents.count.tolist(), strict=True))
    start = 0
    for length in lengths:
        for piece in range(start, start + length, T):
            assert (piece, min(T, start + length - piece)) in pieces
        start += length
    assert len(pieces) == sum(-(-length // T) for length in lengths)


@given(LENGTHS, st.integers(1, 20))
def test_samples_and_their_extents_are_in_file_order(lengths: list[int], T: int) -> None:
    extents = pack(lengths, T)
    rows = [extents.start[begin:end].tolist() for begin, end in itertools.pairwise(extents.first.tolist())]
    assert all(row and row == sorted(row) for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_against_a_loop_over_all_bins(counts: list[int]) -> None:
    rooms: list[int] = []
    for count in sorted(counts, reverse=True):
        fitting = [bin_ for bin_, room in enumerate(rooms) if room >= count]
        if fitting:
            rooms[min(fitting, key=lambda bin_: rooms[bin_])] -= count
        else:
            rooms.append(20 - count)
    bins = best_fit(np.array(counts, dtype=np.int64), 20)
    filled = np.bincount(bins, weights=counts) if counts else np.zeros(0)
    assert sorted(20 - filled) == sorted(rooms)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_not_many_more_bins_than_the_fewest_possible(counts: list[int]) -> None:
    """Within 11/9 of them (Johnson et al. 1974), and the 6/9 that Dosa 2007 proves of first-fit decreasing."""
    bins = len(np.unique(best_fit(np.array(counts, dtype=np.int64), 12)))
    assert bins <= 11 / 9 * fewest_bins(tuple(counts), 12) + 6 / 9


def fewest_bins(counts: tuple[int, ...], room: int) -> int:
    """By dynamic programming over the sets of pieces: the fewest bins, and the least that the last of them holds."""
    best = [(0, room)] + [(len(counts) + 1, 0)] * ((1 << len(counts)) - 1)
    for packed in range(1, len(best)):
        for piece, count in enumerate(counts):
            if packed >> piece & 1:
                bins, held = best[packed ^ 1 << piece]
                best[packed] = min(best[packed], (bins, held + count) if held + count <= room else (bins + 1, count))
    return best[-1][0]


@given(LENGTHS, st.integers(1, 20))
def test_waste_is_less_than_half(lengths: list[int], T: int) -> None:
    """No two bins could have been one, so at most one is not more than half full."""
    extents = pack(lengths, T)
    assert np.count_nonzero(2 * extents.tokens <= T) <= 1
    assert len(extents) <= 2 * sum(lengths) / T + 1


def first_fit(counts: np.ndarray, room: int) -> int:
    """How many bins are filled when each piece, in file order, goes into the first that takes it."""
    rooms: list[int] = []
    for count in counts.tolist():
        for bin_, left in enumerate(rooms):
            if left >= count:
                rooms[bin_] -= count
                break
        else:
            rooms.append(room - count)
    return len(rooms)


@pytest.mark.parametrize("T", [512, 2048, 8192])
def test_waste_on_lengths_like_those_of_text(T: int) -> None:
    lengths = documents_like_text(seed=0, count=2000)
    extents = pack(lengths.tolist(), T)
    assert len(extents) * T < 1.0005 * lengths.sum() + T  # the last bin of a block may be all but empty
    assert len(extents) <= first_fit(extents.count, T)


def test_waste_where_few_documents_go_together() -> None:
    """Lengths around half a sample: the order in which they come costs first fit dearly."""
    lengths = np.random.default_rng(0).integers(500, 1500, 2000)
    extents = pack(lengths.tolist(), 2048)
    packed, in_file_order = len(extents) * 2048 / lengths.sum(), first_fit(lengths, 2048) * 2048 / lengths.sum()
    assert packed < 1.02
    assert in_file_order > 1.05


def test_many_documents_take_little_time() -> None:
    """A shuffle block of very short documents; a search through all bins would take minutes."""
    extents = pack(documents_like_text(seed=1, count=100_000).tolist(), 2048)
    assert len(extents) * 2048 < 1.001 * extents.count.sum() + 2048


def test_no_documents() -> None:
    assert len(pack([], 8)) == 0
