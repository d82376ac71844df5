"""A hash of bits tells tensors apart, and those that differ from most are found."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.replicas import CHUNK_ELEMENTS, Replica, bit_hash, differing_replicas, odd_ones_out, odd_weights

WEIGHTS = odd_weights(torch.device("cpu"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def hashed(*values: torch.Tensor) -> int:
    return int(bit_hash(values, lambda device: WEIGHTS))


def values_of(size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(size=st.integers(1, 50), data=st.data())
@settings(max_examples=50)
def test_any_one_bit_shows(dtype: torch.dtype, size: int, data: st.DataObject) -> None:
    values = values_of(size, dtype)
    place, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 8 * values.element_size() - 1))
    changed = values.clone()
    changed.view(torch.int16 if values.element_size() == 2 else torch.int32)[place] ^= (
        1 << bit if bit + 1 < 8 * values.element_size() else -(1 << bit)
    )
    assert hashed(values) == hashed(values.clone()) != hashed(changed)


@pytest.mark.parametrize("dtype", DTYPES)
@given(size=st.integers(2, 50), data=st.data())
@settings(max_examples=50)
def test_swapped_elements_show(dtype: torch.dtype, size: int, data: st.DataObject) -> None:
    values = values_of(size, dtype)
    values[0], values[-1] = 0.0, -0.0  # which differ in no other way than in their highest bit
    a, b = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2, unique=True))
    swapped = values.clone()
    swapped[[a, b]] = values[[b, a]]
    changed = not torch.equal(values.view(torch.uint8), swapped.view(torch.uint8))
    assert (hashed(values) != hashed(swapped)) == changed


def test_what_differs_in_many_places_shows() -> None:
    values = values_of(1000, torch.float32)
    others = [-values, values.flip(0), values.roll(1), values[:-1], torch.cat([values, torch.ones(1)]), values + 1]
    assert len({hashed(values), *map(hashed, others)}) == 7
    for dtype in DTYPES:  # even numbers of signs, whose differences are all a power of 2
        zeros = torch.zeros(64, dtype=dtype)
        patterns = [zeros.clone() for _ in range(64)]
        for n, pattern in enumerate(patterns):
            pattern[n // 8], pattern[32 + n % 8] = -0.0, -0.0
        assert len({hashed(zeros), *map(hashed, patterns)}) == 65


def test_the_order_of_chunks_and_of_tensors_counts() -> None:
    values = values_of(2 * CHUNK_ELEMENTS + 3, torch.bfloat16)
    first, second, rest = values.split(CHUNK_ELEMENTS)
    assert hashed(values) == hashed(first, second, rest)
    assert len({hashed(values), hashed(second, first, rest), hashed(first, second)}) == 3
    assert hashed() == 0


def test_a_view_at_an_odd_place_is_hashed_as_its_copy() -> None:
    flat = values_of(101, torch.bfloat16)
    assert hashed(flat[1:]) == hashed(flat[1:].clone())
    assert hashed(flat[1:].view(4, 25)) == hashed(flat[1:])


def test_weights_are_odd_and_differ() -> None:
    """Oddness is what makes sure that a single difference shows, and by chance it hardly ever matters."""
    assert (WEIGHTS & 1).all()
    assert len(WEIGHTS.unique()) == CHUNK_ELEMENTS
    assert torch.equal(WEIGHTS, odd_weights(torch.device("cpu")))


def odd(groups: list[list[int]], *hashes: int) -> list[tuple[str, list[int]]]:
    return odd_ones_out([Replica("w", groups, [])], torch.tensor(hashes, dtype=torch.int64)[:, None])


def test_the_majority_is_right() -> None:
    assert odd([[0, 1, 2]], 7, 7, 7) == []
    assert odd([[0, 1, 2]], 8, 7, 7) == [("w", [0])]
    assert odd([[0, 1, 2, 3, 4]], 7, 8, 7, 9, 7) == [("w", [1, 3])]


def test_without_a_majority_the_first_is_right() -> None:
    assert odd([[0, 1]], 7, 8) == [("w", [1])]
    assert odd([[0, 1, 2, 3]], 7, 8, 8, 9) == [("w", [1, 2, 3])]


def test_only_ranks_of_a_group_are_compared() -> None:
    assert odd([[0, 2], [1, 3]], 7, 8, 7, 8) == []
    assert odd([[0, 2], [1, 3]], 7, 8, 7, -8) == [("w", [3])]
    assert odd([[0], [1], [2], [3]], 1, 2, 3, 4) == []


def test_a_name_is_told_once() -> None:
    replicas = [Replica("a", [[0, 1]], []), Replica("b", [[0, 1]], []), Replica("a", [[0, 1]], [])]
    assert odd_ones_out(replicas, torch.tensor([[1, 2, 3], [4, 2, 5]])) == [("a", [1])]


def test_one_rank_alone_has_nothing_to_differ_from() -> None:
    replicas = [Replica("a", [[0]], [torch.ones(3)]), Replica("b", [[0]], [])]
    assert differing_replicas(replicas, torch.device("cpu")) == []
