"""The generator of the parity matrix: every possible pair of values is in it, and the list is a list."""

import itertools
import subprocess
import sys

import pytest

from tests.conftest import environment
from tests.dist.layout_case import LayoutCase
from tests.dist.layouts import (
    AXES,
    BOUND,
    FREE,
    LONG,
    MATRIX,
    TOPOLOGY,
    TRAPS,
    covering_layouts,
    pairs_of,
    pairs_of_all,
    possible,
    possible_cores,
    possible_pairs,
)


def test_every_possible_pair_is_in_the_matrix_and_in_fp32_too_where_it_can_be() -> None:
    assert possible_pairs() <= pairs_of_all(MATRIX)
    assert possible_pairs("fp32") <= pairs_of_all(case for case in MATRIX if case.precision == "fp32")


def test_a_pair_is_possible_where_some_layout_with_it_is() -> None:
    """Found by the rules themselves: a layout for each pair that is called possible, and none for any other."""
    witnesses = [LayoutCase(**dict(zip(BOUND, core, strict=True))) for core in possible_cores()]
    found = pairs_of_all(witnesses)
    values = [(axis, value) for axis in AXES for value in AXES[axis]]
    for a, b in itertools.combinations(values, 2):
        if a[0] != b[0] and a[0] in BOUND and b[0] in BOUND:
            assert (frozenset((a, b)) in possible_pairs()) == (frozenset((a, b)) in found)
    for impossible in (
        {"world": 1, "tensor": 2},  # more degrees than ranks
        {"model": "dense", "expert": 2},  # no experts
        {"precision": "bf16", "zero_stage": 0},  # no masters
        {"offload": "all", "zero_stage": 2},  # parameters are whole
    ):
        assert frozenset(impossible.items()) not in possible_pairs()


@pytest.mark.parametrize("axis", FREE)
def test_a_free_axis_decides_nothing(axis: str) -> None:
    """For possible and impossible layouts alike, every 29th of those that differ on the other axes."""
    rows = list(itertools.product(*(AXES[name] for name in BOUND)))
    for row in rows[::29]:
        case = dict(zip(BOUND, row, strict=True))
        verdicts = {possible(LayoutCase(**case, **{axis: value})) for value in AXES[axis]}
        assert len(verdicts) == 1, case


def test_the_matrix_is_large_and_readable() -> None:
    names = [case.name for case in (*MATRIX, *LONG)]
    assert len(set(names)) == len(names)
    assert all(possible(case) for case in (*MATRIX, *LONG))
    assert set(TRAPS) <= set(MATRIX)
    assert len(MATRIX) >= 40
    for world in AXES["world"]:
        assert {case.model for case in MATRIX if case.world == world} == set(AXES["model"])
    assert names[0].startswith("w1-tp1-sp1-ep1-zero")


def test_every_combination_of_degrees_is_tried() -> None:
    place = [BOUND.index(axis) for axis in TOPOLOGY]
    combinations = {tuple(core[at] for at in place) for core in possible_cores()}
    assert {tuple(getattr(case, axis) for axis in TOPOLOGY) for case in MATRIX} == combinations
    stage = BOUND.index("zero_stage")
    with_stage = {tuple(core[at] for at in [*place, stage]) for core in possible_cores()}
    assert {tuple(getattr(case, a) for a in (*TOPOLOGY, "zero_stage")) for case in (*MATRIX, *LONG)} == with_stage


def test_a_covering_is_small() -> None:
    """The largest two axes need 16 layouts; a greedy covering of all should not need twice as many."""
    rows = covering_layouts(possible_pairs())
    assert possible_pairs() <= pairs_of_all(rows)
    assert len(rows) < 32
    for row in rows:
        assert pairs_of(row) <= possible_pairs()


@pytest.mark.slow
def test_the_list_is_the_same_in_every_process() -> None:
    """A set's order of words differs from process to process; the layouts must not."""
    program = "from tests.dist.layouts import MATRIX, LONG; print(*(case.name for case in (*MATRIX, *LONG)), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**environment(), "PYTHONHASHSEED": "7"},
    )
    assert done.stdout.split() == [case.name for case in (*MATRIX, *LONG)]
