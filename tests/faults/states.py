"""An engine whose state is a function of the step: anyone can say what a checkpoint of a step must hold."""

import zlib
from pathlib import Path

import torch
from torch import Tensor

from pretrain.boxes import Box, Index, Piece
from pretrain.config import RunConfig
from pretrain.engine import build_decoder
from pretrain.engine_torch import TorchEngine
from pretrain.state import TrainState
from tests.small_run import GLOBAL_BATCH, SEQUENCE_LENGTH, small_config


def faults_config(*overrides: str) -> RunConfig:
    """The small model in fp32; the last two checkpoints stay."""
    return small_config("precision=fp32", "checkpoint={every_steps: 1, keep: 2}", *overrides)


class RowsEngine(TorchEngine):
    """The plain engine, of which each of `world` ranks owns, saves and loads some rows of every tensor."""

    def __init__(self, config: RunConfig, rank: int = 0, world: int = 1) -> None:
        cpu = torch.device("cpu")
        super().__init__(build_decoder(config, cpu, torch.float32), config, cpu)
        self.rank, self.world = rank, world

    def pieces(self) -> list[Piece]:
        """See Engine."""
        return [self._own_rows(piece) for piece in super().pieces()]

    def _own_rows(self, piece: Piece) -> Piece:
        rows = piece.shape[0]
        first, last = rows * self.rank // self.world, rows * (self.rank + 1) // self.world
        box = Box((first, *piece.box.offset[1:]), (last - first, *piece.shape[1:]))
        return Piece(piece.name, piece.shape, box, True, {kind: view[first:last] for kind, view in piece.views.items()})

    @torch.no_grad()
    def become(self, step: int) -> TrainState:
        """Take the state of a step."""
        for piece in self.pieces():
            for kind, view in piece.views.items():
                view.copy_(_rows(step, kind, piece))
        self.restored({"optimizer_steps": step})
        return state_of(step)

    def differences(self, step: int) -> list[str]:
        """What is not, bit for bit, as it is at a step."""
        found = [
            f"{kind}/{piece.name}"
            for piece in self.pieces()
            for kind, view in piece.views.items()
            if not torch.equal(view, _rows(step, kind, piece))
        ]
        return found + [f"{key} is {value}" for key, value in self.scalars().items() if value != step]


def state_of(step: int) -> TrainState:
    """What the trainer knows at a step."""
    return TrainState(step, step * GLOBAL_BATCH, step * GLOBAL_BATCH * SEQUENCE_LENGTH)


def _rows(step: int, kind: str, piece: Piece) -> Tensor:
    first, count = piece.box.offset[0], piece.box.size[0]
    return _values(step, kind, piece.name, piece.shape)[first : first + count]


def _values(step: int, kind: str, name: str, shape: Index) -> Tensor:
    """A logical tensor, whole."""
    seed = zlib.crc32(f"{step} {kind} {name}".encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def names_in(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())
