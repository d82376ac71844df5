"""Reading boxes of one layout from the boxes of another: every value from its place, or a refusal."""

import math
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.boxes import Box, Index, Piece, boxes_of_range, common, slices
from pretrain.checkpoint import read
from pretrain.checkpoint.index import (
    CheckpointIndex,
    DamagedError,
    StoredFile,
    StoredParameter,
    packed_boxes,
    rank_file_name,
    stored_parameters,
    write_index,
)
from pretrain.checkpoint.rank_file import tensor_key, write_rank_file
from pretrain.checkpoint.read import CheckpointReader, plan_copies, read_weights
from pretrain.engine_torch import TorchEngine
from tests.checkpoint_edit import edit_index, flip_bit
from tests.small_run import MODELS, small_config
from tests.unit.pretrain.checkpoint.made import SMALL_BLOCK, count_reads, new_engine, save, train

pytestmark = pytest.mark.usefixtures("small_blocks")
KINDS = ("fp32", "exp_avg")
Layout = list[tuple[int, str, Box]]
"""Who holds what: (rank, name, box)."""


def whole(shape: Index) -> Box:
    return Box((0,) * len(shape), shape)


def value(name: str, shape: Index, kind: str) -> Tensor:
    """Values of which no two are alike, whatever the tensor and the kind."""
    number = 2 * int(name) + KINDS.index(kind)
    return (torch.arange(math.prod(shape), dtype=torch.float32) + 1000 * number).view(shape)


def index_of(shapes: dict[str, Index], layout: Layout, ranks: int) -> CheckpointIndex:
    """The index of a checkpoint in this layout; of its files it knows nothing yet."""
    held = [[(name, shapes[name], box) for owner, name, box in layout if owner == rank] for rank in range(ranks)]
    return CheckpointIndex(
        step=0,
        model=small_config().model,
        sequence_length=1,
        block_bytes=SMALL_BLOCK,
        files=[StoredFile(size_bytes=0, xxh3="0" * 16)] * ranks,
        parameters=stored_parameters([packed_boxes(rank, of_rank) for rank, of_rank in enumerate(held)]),
    )


def write(folder: Path, shapes: dict[str, Index], layout: Layout, ranks: int) -> Path:
    """A checkpoint in this layout."""
    files = []
    for rank in range(ranks):
        held = [(kind, name, box) for owner, name, box in layout if owner == rank for kind in KINDS]
        entries = [(tensor_key(kind, name, box), box.size) for kind, name, box in held]
        values = [value(name, shapes[name], kind)[slices(box, whole(shapes[name]))] for kind, name, box in held]
        files.append(write_rank_file(folder / rank_file_name(rank), entries, values))
    write_index(folder, index_of(shapes, layout, ranks).model_copy(update={"files": files}))
    return folder


@st.composite
def parts(draw: st.DrawFn, shape: Index) -> list[Box]:
    """A tensor cut as tensor parallelism cuts, and each shard as ZeRO does: unevenly, anywhere."""
    dimension = draw(st.integers(0, len(shape) - 1))
    cuts = sorted(draw(st.sets(st.integers(1, shape[dimension]), max_size=2)) | {0, shape[dimension]})
    found = []
    for begin, end in pairwise(cuts):
        offset = tuple(begin if i == dimension else 0 for i in range(len(shape)))
        size = tuple(end - begin if i == dimension else n for i, n in enumerate(shape))
        flat_cuts = draw(st.lists(st.integers(0, math.prod(size)), max_size=3).map(sorted))
        for start, stop in pairwise([0, *flat_cuts, math.prod(size)]):
            for box in boxes_of_range(size, start, stop):
                found.append(Box(tuple(i + j for i, j in zip(box.offset, offset, strict=True)), box.size))
    return found


many_shapes = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3).map(
    lambda shapes: {str(number): shape for number, shape in enumerate(shapes)}
)


@st.composite
def layouts(draw: st.DrawFn, shapes: dict[str, Index], ranks: int) -> Layout:
    """Every part of every tensor, each with some rank, in any order."""
    boxes = [(name, box) for name, shape in shapes.items() for box in draw(parts(shape))]
    return [(draw(st.integers(0, ranks - 1)), name, box) for name, box in draw(st.permutations(boxes))]


def pieces_of(shapes: dict[str, Index], layout: Layout, kinds: tuple[str, ...] = KINDS) -> list[Piece]:
    """What a layout wants filled; the views are every second row of something larger, as views may be."""

    def view(box: Box) -> Tensor:
        return torch.full((2 * box.size[0], *box.size[1:]), -1.0)[::2]

    return [Piece(name, shapes[name], box, True, {kind: view(box) for kind in kinds}) for _, name, box in layout]


@settings(max_examples=50)
@given(many_shapes, st.data())
def test_a_plan_is_what_brute_force_finds(shapes: dict[str, Index], data: st.DataObject) -> None:
    stored, wanted = data.draw(layouts(shapes, 3)), data.draw(layouts(shapes, 1))
    pieces = pieces_of(shapes, wanted)
    expected = [
        (rank, box, part, number)
        for number, piece in enumerate(pieces)
        for rank, name, box in stored
        if name == piece.name and (part := common(box, piece.box)) is not None
    ]
    planned = [
        (rank, copy.stored, copy.part, next(i for i, piece in enumerate(pieces) if piece is copy.piece))
        for rank, copies in plan_copies(index_of(shapes, stored, 3), pieces).items()
        for copy in copies
    ]
    assert sorted(planned, key=repr) == sorted(expected, key=repr)


@settings(max_examples=20)
@given(many_shapes, st.data())
def test_pieces_are_filled_with_the_values_of_their_places(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, Index], data: st.DataObject
) -> None:
    ranks = data.draw(st.integers(1, 2))
    checkpoint = write(tmp_path_factory.mktemp("fill"), shapes, data.draw(layouts(shapes, ranks)), ranks)
    kinds = data.draw(st.sampled_from([KINDS, ("fp32",), ("exp_avg",)]))
    pieces = pieces_of(shapes, data.draw(layouts(shapes, 1)), kinds)
    with CheckpointReader(checkpoint) as reader:
        reader.fill(pieces)
        for piece in pieces:
            assert piece.views.keys() == set(kinds)
            for kind, view in piece.views.items():
                assert torch.equal(view, value(piece.name, piece.shape, kind)[slices(piece.box, whole(piece.shape))])
        for name, shape in shapes.items():
            assert torch.equal(reader.tensor(name), value(name, shape, "fp32"))
            assert torch.equal(reader.tensor(name, "exp_avg"), value(name, shape, "exp_avg"))


def test_only_the_rows_that_are_wanted_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of many reads its own part of a file, and of the blocks that two parts share none twice."""
    shapes: dict[str, Index] = {"0": (100, 16), "1": (40,)}  # 64 bytes a row
    layout = [(0, name, whole(shape)) for name, shape in shapes.items()]
    checkpoint = write(tmp_path, shapes, layout, 1)
    # 20.5 rows, as a share of ZeRO's; and all of the second tensor.
    boxes = [("0", box) for box in boxes_of_range((100, 16), 10 * 16, 30 * 16 + 8)] + [("1", whole((40,)))]
    pieces = pieces_of(shapes, [(0, name, box) for name, box in boxes])
    with CheckpointReader(checkpoint) as reader:
        reader._open(0)
        counts = count_reads(monkeypatch)
        reader.fill(pieces)
    rows, second = 21 * SMALL_BLOCK, 3 * SMALL_BLOCK
    # The second tensor's two kinds lie one after the other at the end of the file, which a block's end cuts short.
    assert sum(counts) == 2 * rows + 2 * second - SMALL_BLOCK


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "OPEN_FILES", 3)
    shapes: dict[str, Index] = {"0": (10, 3), "1": (10,)}
    layout = [
        (row, name, Box((row, *(0,) * (len(shape) - 1)), (1, *shape[1:])))
        for name, shape in shapes.items()
        for row in range(10)
    ]
    checkpoint = write(tmp_path, shapes, layout, 10)

    def open_files() -> list[str]:
        links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return [str(link.readlink()) for link in links if link.is_symlink() and "rank-" in str(link.readlink())]

    with CheckpointReader(checkpoint) as reader:
        for _ in range(2):
            for name, shape in shapes.items():
                assert torch.equal(reader.tensor(name), value(name, shape, "fp32"))
                assert len(open_files()) == 3
    assert open_files() == []


@pytest.mark.parametrize(
    ("boxes", "covered"),
    [
        ([], 0),
        ([Box((0, 0), (4, 5))], 20),
        ([Box((0, 0), (2, 6)), Box((3, 0), (1, 6))], 18),
        ([Box((0, 0), (4, 6)), Box((1, 1), (1, 1))], 25),
        ([Box((0, 0), (4, 6))] * 2, 48),
    ],
)
def test_what_is_not_covered_once_is_damage(boxes: list[Box], covered: int, tmp_path: Path) -> None:
    shapes: dict[str, Index] = {"0": (3,), "1": (4, 6)}
    layout = [(0, "0", whole((3,))), *((0, "1", box) for box in boxes)]
    index = index_of(shapes, layout, 1)
    if not boxes:
        index.parameters["1"] = StoredParameter(shape=(4, 6), boxes=[])
    write_index(tmp_path, index)
    with pytest.raises(DamagedError, match=f"covers {covered} of 24 values of 1: it is damaged"):
        plan_copies(index, pieces_of(shapes, [(0, "1", whole((4, 6)))]))
    with pytest.raises(DamagedError, match=f"covers {covered} of 24 values of 1"):
        CheckpointReader(tmp_path, index).tensor("1")


def test_another_model_is_no_damage() -> None:
    index = index_of({"0": (3,)}, [(0, "0", whole((3,)))], 1)
    for name, shape, words in (
        ("0", (4,), r"it holds shape \[3\] for 0, the model's config says \[4\]"),
        ("0", (3, 1), r"it holds shape \[3\] for 0, the model's config says \[3, 1\]"),
        ("1", (3,), r"it holds nothing for 1, the model's config says \[3\]"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            plan_copies(index, pieces_of({name: shape}, [(0, name, whole(shape))]))
        assert not isinstance(caught.value, DamagedError)


def test_what_is_not_there_is_damage(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {"0": (3,)}, [(0, "0", whole((3,)))], 1)
    with CheckpointReader(checkpoint) as reader:
        with pytest.raises(DamagedError, match=f"{checkpoint} holds nothing for 1"):
            reader.tensor("1")
        with pytest.raises(DamagedError, match=r"does not hold exp_avg_sq/0@0 of shape \[3\], as the index says"):
            reader.tensor("0", "exp_avg_sq")
    edit_index(checkpoint, lambda index: index["parameters"]["0"].update(shape=[2, 2], boxes=[0, 0, 0, 2, 2]))
    with CheckpointReader(checkpoint) as reader, pytest.raises(DamagedError, match=r"fp32/0@0,0 of shape \[2, 2\]"):
        reader.tensor("0")


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_read_whole(model: str, tmp_path: Path) -> None:
    engine = new_engine(f"model.moe={MODELS[model]}", "precision=bf16")
    train(engine, 0)
    checkpoint = save(tmp_path, engine, 1)
    expected = {piece.name: piece.views for piece in engine.pieces()}
    weights = read_weights(checkpoint)
    assert weights.keys() == expected.keys()
    assert any("router.bias" in name for name in weights) == (model == "moebias")
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]["fp32"])
    averages = read_weights(checkpoint, "exp_avg")
    assert averages.keys() == set(engine.masters)
    for name, tensor in averages.items():
        assert torch.equal(tensor, expected[name]["exp_avg"])


def test_damage_is_named(engine: TorchEngine, tmp_path: Path) -> None:
    checkpoint = save(tmp_path, engine, 2)
    path = checkpoint / rank_file_name(0)
    middle = next(number for number, piece in enumerate(engine.pieces()) if 2 * number > len(engine.pieces()))
    name = engine.pieces()[middle].name
    begin = sum(3 * 4 * piece.box.numel for piece in engine.pieces()[:middle])
    flip_bit(path, begin + int.from_bytes(path.read_bytes()[:8], "little") + 8 + 40)
    key = rf"fp32/{name}@0(,0)*"
    with pytest.raises(
        DamagedError, match=rf"{path} is damaged: block {begin // SMALL_BLOCK} \({key}\) fails its hash"
    ):
        read_weights(checkpoint)
    assert read_weights(checkpoint, "exp_avg").keys() == set(engine.masters)
