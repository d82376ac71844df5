"""The pairs of test_reshard.py make every change that they claim to, and come in an order that can be."""

import itertools
import math
from typing import get_args, get_type_hints

import pytest

from model.parameters import parameter_shapes
from pretrain.layout import Layout, check_layout
from pretrain.placement import placement
from tests.dist.reshard_pairs import AXES, FAMILIES, LAYOUTS, LOADS, SAME, Change, covering_loads, launches

TYPES = get_type_hints(type(LAYOUTS[0]))


def test_there_are_many() -> None:
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS) == len(SAME) >= 30
    assert len(set(LOADS)) == len(LOADS) >= 60
    for layout in LAYOUTS:
        check_layout(layout.config(), layout.world)
        assert any(load.source == layout for load in LOADS)
        assert any(load.target == layout for load in LOADS)
    for source, target in LOADS:
        assert source != target
        assert source.family == target.family


@pytest.mark.parametrize("axis", AXES)
def test_every_value_of_an_axis_becomes_every_other(axis: str) -> None:
    """And in fp32 alone, where what follows is compared to 1e-5, unless it is the precision that changes."""
    narrow = [load for load in LOADS if all(layout.precision == "fp32" for layout in load)]
    seen = set().union(*(load.changes for load in (LOADS if axis == "precision" else narrow)))
    for old, new in itertools.permutations(get_args(TYPES[axis]), 2):
        assert Change(axis, old, new) in seen


@pytest.mark.parametrize("precision", get_args(TYPES["precision"]))
def test_every_precision_stays_while_the_layout_changes(precision: str) -> None:
    assert any(load.source.precision == load.target.precision == precision for load in LOADS)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_makes_the_changes_that_it_can(family: str) -> None:
    layouts = [layout for layout in LAYOUTS if layout.family == family]
    for precisions in (("fp32",), get_args(TYPES["precision"])):
        among = [layout for layout in layouts if layout.precision in precisions]
        seen = set().union(*(load.changes for load in LOADS if load.source in among and load.target in among))
        for axis in AXES:
            for old, new in itertools.permutations({getattr(layout, axis) for layout in among}, 2):
                assert Change(axis, old, new) in seen
    stages = {layout.zero_stage for layout in layouts}
    assert stages == ({0, 1, 2} if family == "muon" else {0, 1, 2, 3})
    assert {layout.world for layout in layouts} == {1, 2, 4}
    assert covering_loads(layouts) == [load for load in LOADS if load.target in layouts]


def test_some_shards_are_not_a_multiple_of_the_ranks_that_share_them() -> None:
    uneven = set()
    for layout in LAYOUTS:
        config = layout.config()
        degrees = Layout.of(config, layout.world)
        for name, shape in parameter_shapes(config.model).items():
            place = placement(name, shape, degrees, rank=0)
            if math.prod(place.box.size) % len(degrees.group_of(0, place.replicas)):
                uneven.add((layout.family, layout.zero_stage))
    assert uneven >= {("dense", 1), ("dense", 2), ("dense", 3), ("muon", 1), ("moe", 3), ("moebias", 3)}


def test_no_checkpoint_is_loaded_before_it_is_there() -> None:
    cases = [(world, name) for world, names in launches() for name in names]
    assert len(cases) == len(set(cases)) == len(LAYOUTS) + len(SAME) + len(LOADS)
    at = {name: number for number, (_, name) in enumerate(cases)}
    worlds = {name: world for world, name in cases}
    for load in (*SAME, *LOADS):
        assert at[load.name] > at[load.source.name]
        assert worlds[load.name] == load.target.world
