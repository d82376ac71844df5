"""The geometry of checkpoints: any flat range is few boxes that cover it once, and boxes meet where they should."""

import math
from itertools import pairwise

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


@given(st.integers(0, 4), st.data())
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
    assert (part is None) == (not (marks == 2).any())
    if part is not None:
        assert part.numel == int((marks == 2).sum())
        assert bool((marks[slices(part, whole)] == 2).all())
        tensor = torch.arange(8**dimensions).view(shape)
        assert torch.equal(tensor[slices(a, whole)][slices(part, a)], tensor[slices(b, whole)][slices(part, b)])


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """A tensor as the ranks of some layout hold it: equal shards along a dimension, as tensor and expert parallelism
    cut, and of each uneven flat shares, as ZeRO cuts, some of them empty."""
    shards = [Box((0,) * len(shape), shape)]
    if shape:
        dimension = draw(st.integers(0, len(shape) - 1))
        width = draw(st.sampled_from([n for n in range(1, shape[dimension] + 1) if shape[dimension] % n == 0]))
        size = (*shape[:dimension], width, *shape[dimension + 1 :])
        shards = [
            Box(tuple(at if i == dimension else 0 for i in range(len(shape))), size)
            for at in range(0, shape[dimension], width)
        ]
    held = []
    for shard in shards:
        cuts = draw(st.lists(st.integers(0, shard.numel), max_size=4).map(sorted))
        for start, stop in pairwise([0, *cuts, shard.numel]):
            for box in boxes_of_range(shard.size, start, stop):
                held.append(Box(tuple(i + j for i, j in zip(box.offset, shard.offset, strict=True)), box.size))
    return held


@given(shapes, st.data())
def test_what_one_layout_holds_is_put_together_from_what_another_does(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    """Every element comes from one stored box, and with its own value."""
    whole = Box((0,) * len(shape), shape)
    tensor = torch.arange(math.prod(shape)).view(shape)
    stored, wanted = data.draw(layouts(shape)), data.draw(layouts(shape))
    assert sum(box.numel for box in stored) == tensor.numel()
    files = [tensor[slices(box, whole)].clone() for box in stored]
    for box in wanted:
        loaded = torch.full(box.size, -1)
        found = 0
        for file, holder in zip(files, stored, strict=True):
            part = common(box, holder)
            if part is not None:
                loaded[slices(part, box)] = file[slices(part, holder)]
                found += part.numel
        assert found == box.numel
        assert loaded.equal(tensor[slices(box, whole)])
