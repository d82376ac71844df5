import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.permutation import derive_key, permute, unpermute

KEYS = st.integers(0, 2**64 - 1)


@given(st.integers(1, 5000), KEYS)
def test_a_bijection_with_its_inverse(size: int, key: int) -> None:
    index = np.arange(size)
    there = permute(index, size, key)
    assert np.array_equal(np.sort(there), index)
    assert np.array_equal(unpermute(there, size, key), index)


@given(st.integers(1, 2**50), KEYS, st.data())
def test_large_domains(size: int, key: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), dtype=np.int64)
    there = permute(index, size, key)
    assert np.all((there >= 0) & (there < size))
    assert np.array_equal(unpermute(there, size, key), index)


@given(st.lists(st.tuples(st.integers(1, 300), KEYS), min_size=1, max_size=20), st.data())
def test_size_and_key_may_differ_by_element(domains: list[tuple[int, int]], data: st.DataObject) -> None:
    index = np.array([data.draw(st.integers(0, size - 1)) for size, _ in domains])
    together = permute(index, np.array([size for size, _ in domains]), np.array([key for _, key in domains], np.uint64))
    alone = [permute(index[i : i + 1], size, key)[0] for i, (size, key) in enumerate(domains)]
    assert together.tolist() == alone


def test_all_orders_of_a_small_domain_are_about_as_frequent() -> None:
    draws = 24 * 400
    seen = dict.fromkeys(itertools.permutations(range(4)), 0)
    for number in range(draws):
        seen[tuple(permute(np.arange(4), 4, derive_key("test", number)).tolist())] += 1
    chi_squared = sum((count - draws / 24) ** 2 / (draws / 24) for count in seen.values())
    # 23 degrees of freedom: mean 23, standard deviation 6.8. The draws are fixed, so this passes or fails for good.
    assert chi_squared < 60


@pytest.mark.parametrize("size", [1000, 4096, 100_003])
def test_neighbours_are_torn_apart(size: int) -> None:
    there = permute(np.arange(size), size, derive_key("test", size))
    bound = 5 / np.sqrt(size)
    assert abs(np.corrcoef(there[:-1], there[1:])[0, 1]) < bound
    assert abs(np.corrcoef(there, np.arange(size))[0, 1]) < bound
    bins = np.bincount(there[: size // 4] * 16 // size, minlength=16)
    assert abs(bins / (size / 64) - 1).max() < 5 / np.sqrt(size / 64)


def test_keys_of_different_purposes_differ() -> None:
    keys = {derive_key(*parts) for parts in [("a", 1, 23), ("a", 12, 3), ("a1", 23), ("a", 1, "2", 3), ("a", 1, 2, 3)]}
    assert len(keys) == 4  # "2" and 2 read the same


def test_the_order_is_recorded() -> None:
    """Runs resume by this order: it must not change between versions, machines or numpys."""
    assert permute(np.arange(10), 10, 7).tolist() == [2, 0, 8, 4, 5, 1, 9, 6, 3, 7]
