"""The geometry of checkpoints: any flat range is few boxes that cover it once, and boxes meet where they should."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.boxes import Box, boxes_of_range, common, slices

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@given(shapes, st.data())
def test_boxes_of_a_range_are_that_range_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    tensor = torch.arange(numel).view(shape)
    boxes = boxes_of_range(shape, start, stop)
    whole = Box((0,) * len(shape), shape)
    values = [tensor[slices(box, whole)].flatten() for box in boxes]
    assert torch.equal(torch.cat(values) if values else torch.empty(0, dtype=torch.long), torch.arange(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert sum(box.numel for box in boxes) == stop - start


@given(st.integers(1, 4), st.data())
def test_common_is_what_both_hold(dimensions: int, data: st.DataObject) -> None:
    def box() -> Box:
        offset = tuple(data.draw(st.integers(0, 4)) for _ in range(dimensions))
        return Box(offset, tuple(data.draw(st.integers(1, 4)) for _ in range(dimensions)))

    a, b = box(), box()
    shape = (8,) * dimensions
    whole = Box((0,) * dimensions, shape)
    marks = torch.zeros(shape, dtype=torch.int64)
    marks[slices(a, whole)] += 1
    marks[slices(b, whole)] += 1
    part = common(a, b)
    assert part == common(b, a)
    assert (0 if part is None else part.numel) == int((marks == 2).sum())
    if part is not None:
        assert bool((marks[slices(part, whole)] == 2).all())
        tensor = torch.arange(8**dimensions).view(shape)
        assert torch.equal(tensor[slices(a, whole)][slices(part, a)], tensor[slices(b, whole)][slices(part, b)])
