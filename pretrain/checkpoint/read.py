"""Reading what is wanted of a checkpoint: boxes are intersected, and each stored block is read once and verified."""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from model.parameters import buffer_shapes
from pretrain.boxes import Box, Piece, common, slices
from pretrain.checkpoint.index import CheckpointIndex, DamagedError, rank_file_name, read_index
from pretrain.checkpoint.rank_file import RankFile, tensor_key
from pretrain.device import is_processor
from pretrain.pages import empty_pages

OPEN_FILES = 512  # at a time: a process may have 1,024, and not for this alone


class Copy(NamedTuple):
    """The part of a stored box that goes into a piece."""

    stored: Box
    part: Box
    piece: Piece


def plan_copies(index: CheckpointIndex, pieces: Sequence[Piece]) -> dict[int, list[Copy]]:
    """What to read for these pieces, by the rank whose file holds it.

    Raises ValueError where the model is another, DamagedError where the checkpoint does not cover a piece.
    """
    copies: dict[int, list[Copy]] = defaultdict(list)
    for piece in pieces:
        stored = index.parameters.get(piece.name)
        if stored is None or stored.shape != piece.shape:
            has = "nothing" if stored is None else f"shape {list(stored.shape)}"
            raise ValueError(f"it holds {has} for {piece.name}, the model's config says {list(piece.shape)}")
        low = np.maximum(stored.offsets, piece.box.offset)
        high = np.minimum(stored.offsets + stored.sizes, np.add(piece.box.offset, piece.box.size))
        covered = 0
        for row in np.flatnonzero((low < high).all(axis=1)).tolist():
            box = stored.box(row)
            part = common(box, piece.box)
            assert part is not None
            covered += part.numel
            copies[int(stored.ranks[row])].append(Copy(box, part, piece))
        if covered != piece.box.numel:
            raise DamagedError(f"it covers {covered} of {piece.box.numel} values of {piece.name}: it is damaged")
    return copies


class CheckpointReader:
    """The tensors of a checkpoint, verified as they are read."""

    def __init__(self, checkpoint: Path, index: CheckpointIndex | None = None) -> None:
        """index: where it is known already. Raises DamagedError, see `read_index`."""
        self.checkpoint = checkpoint
        self.index = read_index(checkpoint) if index is None else index
        self._files: OrderedDict[int, RankFile] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open; what is read afterwards is opened again."""
        while self._files:
            self._files.popitem()[1].close()

    @torch.no_grad()
    def fill(self, pieces: Sequence[Piece]) -> None:
        """Write the stored values into the views of these pieces, all their kinds.

        Raises ValueError where the model is another, DamagedError where a value is missing or damaged, OSError where a
        file cannot be read; some views have been written to then.
        """
        for rank, copies in sorted(plan_copies(self.index, pieces).items()):
            file = self._open(rank)
            reads = []
            for copy in copies:
                for kind in copy.piece.views:
                    key = tensor_key(kind, copy.piece.name, copy.stored)
                    reads.append((file.start_of(key, copy.stored.size), key, kind, copy))
            reads.sort(key=lambda read: read[:2])  # onwards through the file
            for _, key, kind, copy in reads:
                _copy_rows(file, key, copy, copy.piece.views[kind])
            file.release()

    def tensor(self, name: str, kind: str = "fp32") -> Tensor:
        """A logical tensor, whole, fp32 on the CPU. Raises as `fill` does."""
        if name not in self.index.parameters:
            raise DamagedError(f"{self.checkpoint} holds nothing for {name}")
        shape = self.index.parameters[name].shape
        whole = empty_pages(shape, torch.float32)
        self.fill([Piece(name, shape, Box((0,) * len(shape), shape), False, {kind: whole})])
        return whole

    def weights(self, kind: str = "fp32") -> dict[str, Tensor]:
        """All of `tensor`, by name. kind: another than `fp32` is of the parameters alone; buffers have none."""
        buffers = buffer_shapes(self.index.model)
        names = [name for name in self.index.parameters if kind == "fp32" or name not in buffers]
        return {name: self.tensor(name, kind) for name in names}

    def _open(self, rank: int) -> RankFile:
        if rank not in self._files:
            if len(self._files) == OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            path = self.checkpoint / rank_file_name(rank)
            self._files[rank] = RankFile(path, self.index.files[rank], self.index.block_bytes)
        return self._files[rank]


def _copy_rows(file: RankFile, key: str, copy: Copy, view: Tensor) -> None:
    """Copy a part of a stored tensor into a piece's view: straight from the file, or some rows at a time."""
    first = copy.part.offset[0] - copy.stored.offset[0]
    source, target = slices(copy.part, copy.stored)[1:], slices(copy.part, copy.piece.box)
    into = view[target]
    if copy.part.size[1:] == copy.stored.size[1:] and (data := _bytes_of(into)) is not None:
        row_bytes = len(data) // copy.part.size[0]
        file.read_into(data, file.start_of(key, copy.stored.size) + first * row_bytes)
        return
    for row, rows in file.rows(key, copy.stored.size, first, first + copy.part.size[0]):
        into[row - first : row - first + len(rows)] = rows[:, *source].to(view.device)


def _bytes_of(values: Tensor) -> memoryview | None:
    """The memory of values that lie one after the other on the host as they do in a file; else None."""
    if not (is_processor(values.device) and values.dtype == torch.float32 and values.is_contiguous()):
        return None
    return values.detach().numpy().data.cast("B")


def read_weights(checkpoint: Path, kind: str = "fp32") -> dict[str, Tensor]:
    """`CheckpointReader.weights` of a checkpoint: fp32 under their logical names, whole, on the CPU."""
    with CheckpointReader(checkpoint) as reader:
        return reader.weights(kind)
