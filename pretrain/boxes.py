"""Boxes of logical tensors: the geometry that lets a checkpoint of one layout load into any other. Pure functions.

A ZeRO rank owns, of each parameter, one contiguous flat range. A flat range of a row-major N-D tensor is at most 2N-1
boxes (part of a row, whole rows, part of a row, and so on inwards), and a box no longer mentions the layout it came
from. Loading intersects the boxes that are wanted with the boxes that are stored.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Index = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor: where it begins and how far it reaches, per dimension."""

    offset: Index
    size: Index

    @property
    def numel(self) -> int:
        return math.prod(self.size)


@dataclass(frozen=True)
class Piece:
    """One box of one logical tensor, with this rank's live views of its values.

    `views` maps a kind of state (`fp32`, the master; `exp_avg`; `exp_avg_sq`) to a tensor of the box's size; writing
    into it writes the engine's state. Of several ranks that hold a copy, one is the `writer`.
    """

    name: str
    shape: Index
    box: Box
    writer: bool
    views: "dict[str, Tensor]"


def boxes_of_range(shape: Index, start: int, stop: int) -> list[Box]:
    """The flat range [start, stop) of a row-major tensor, as boxes in flat order."""
    if start >= stop:
        return []
    if not shape:
        return [Box((), ())]
    if len(shape) == 1:
        return [Box((start,), (stop - start,))]
    row = math.prod(shape[1:])
    first_whole, end_whole = -(-start // row), stop // row

    def part_of_row(index: int, begin: int, end: int) -> list[Box]:
        return [Box((index, *box.offset), (1, *box.size)) for box in boxes_of_range(shape[1:], begin, end)]

    if first_whole > end_whole:  # begins and ends inside one row
        return part_of_row(end_whole, start - end_whole * row, stop - end_whole * row)
    boxes = part_of_row(first_whole - 1, start - (first_whole - 1) * row, row) if start < first_whole * row else []
    if end_whole > first_whole:
        boxes.append(Box((first_whole, *[0] * (len(shape) - 1)), (end_whole - first_whole, *shape[1:])))
    return boxes + part_of_row(end_whole, 0, stop - end_whole * row)


def common(a: Box, b: Box) -> Box | None:
    """What two boxes share, or None."""
    low = tuple(map(max, a.offset, b.offset))
    high = tuple(min(i + n, j + m) for i, n, j, m in zip(a.offset, a.size, b.offset, b.size, strict=True))
    if any(h <= i for i, h in zip(low, high, strict=True)):
        return None
    return Box(low, tuple(h - i for i, h in zip(low, high, strict=True)))


def slices(part: Box, whole: Box) -> tuple[slice, ...]:
    """Where `part` lies inside a tensor that holds `whole`."""
    return tuple(
        slice(i - origin, i - origin + n) for i, n, origin in zip(part.offset, part.size, whole.offset, strict=True)
    )
