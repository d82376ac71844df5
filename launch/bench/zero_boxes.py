"""Which boxes a rank of any layout holds, by arithmetic: no engine, no torch, a thousand ranks in seconds."""

from collections.abc import Iterator
from typing import Any

from model.parameters import buffer_shapes, is_decayed, keeps_fp32, parameter_shapes
from pretrain.boxes import Box, Piece, boxes_of_range
from pretrain.config import RunConfig
from pretrain.layout import Axis, Layout
from pretrain.placement import Placement, kept_beside_zero, placement


def pieces_of(config: RunConfig, layout: Layout, rank: int) -> list[Piece]:
    """What `Engine.pieces` would be on a rank, with no views.

    At ZeRO 3 the replicas of a parameter share out each one evenly, at 1 and 2 all of an optimizer's group end to end.
    Both round up, the latter to whole pairs, as DeepSpeed does for the alignment of 16-bit values.
    """
    places = {name: placement(name, shape, layout, rank) for name, shape in parameter_shapes(config.model).items()}
    beside = {name for name in places if config.parallel.zero_stage == 0 or kept_beside_zero(name, config)}
    shared_out = {name: place for name, place in places.items() if name not in beside}
    found = []
    for name, place, begin, end in _shares(shared_out, config.parallel.zero_stage == 3, layout, rank):
        writer = place.copies is None or _index(layout, rank, place.copies) == 0
        for local in boxes_of_range(place.box.size, begin, end):
            offset = tuple(i + j for i, j in zip(local.offset, place.box.offset, strict=True))
            found.append(Piece(name, place.shape, Box(offset, local.size), writer, {}))
    for name in beside:
        axes = [axis for axis in (places[name].copies, places[name].replicas) if axis is not None]
        writer = all(_index(layout, rank, axis) == 0 for axis in axes)
        found.append(Piece(name, places[name].shape, places[name].box, writer, {}))
    for name, shape in buffer_shapes(config.model).items():
        found.append(Piece(name, shape, placement(name, shape, layout, rank).box, rank == 0, {}))
    return found


def _shares(
    places: dict[str, Placement], each: bool, layout: Layout, rank: int
) -> Iterator[tuple[str, Placement, int, int]]:
    """(name, place, begin, end) of a rank's flat range in its shard of each parameter; it may be empty.

    each: every parameter is shared out by itself, not all those together that the optimizer treats alike.
    """
    families: dict[Any, dict[str, Placement]] = {}
    for name, place in places.items():
        alike = name if each else (place.replicas, keeps_fp32(name), is_decayed(name))
        families.setdefault(alike, {})[name] = place
    for family in families.values():
        replicas = next(iter(family.values())).replicas
        total = sum(place.box.numel for place in family.values())
        unit = 1 if each else 2
        share = -(-total // (unit * len(layout.group_of(rank, replicas)))) * unit
        first, at = share * _index(layout, rank, replicas), 0
        for name, place in family.items():
            size = place.box.numel
            yield name, place, min(max(first - at, 0), size), min(max(first + share - at, 0), size)
            at += size


def _index(layout: Layout, rank: int, axis: Axis) -> int:
    return layout.group_of(rank, axis).index(rank)
