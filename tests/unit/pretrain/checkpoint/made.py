"""Small engines and their checkpoints, what is in them, and every way in which one of them may be damaged."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint.folder import checkpoint_path
from pretrain.checkpoint.read import CheckpointReader
from pretrain.checkpoint.save import save_checkpoint
from pretrain.config import RunConfig
from pretrain.engine import build_decoder
from pretrain.engine_torch import TorchEngine
from pretrain.state import TrainState
from tests.checkpoint_edit import flip_bit
from tests.small_run import rank_batches, small_config

CPU = torch.device("cpu")
RANK_FILE = "rank-00000.safetensors"
SMALL_BLOCK = 64
State = dict[tuple[str, str], Tensor]
"""Values by (name, kind)."""


def new_engine(*overrides: str) -> TorchEngine:
    """The small model at step 0."""
    config = small_config(*overrides)
    return TorchEngine(build_decoder(config, CPU, torch.float32), config, CPU)


def train(engine: TorchEngine, step: int, before_update: Callable[[], None] = lambda: None) -> None:
    """One optimizer step, large enough that every value moves."""
    engine.train_step(rank_batches(engine.config, step, 0, 1), 1e-2, before_update)


def save(folder: Path, engine: TorchEngine, step: int, tokenizer: Path | None = None, *overrides: str) -> Path:
    """A checkpoint of an engine; the overrides are of the config that it is saved with."""
    config = small_config(*overrides) if overrides else engine.config
    return save_checkpoint(folder, engine, TrainState(step=step), config, tokenizer, None)


def state_of(engine: TorchEngine) -> State:
    """A copy of the masters and the optimizer's state."""
    return {(piece.name, kind): view.clone() for piece in engine.pieces() for kind, view in piece.views.items()}


def stored_in(checkpoint: Path, like: State) -> State:
    """What a checkpoint holds of the same names and kinds."""
    with CheckpointReader(checkpoint) as reader:
        return {(name, kind): reader.tensor(name, kind) for name, kind in like}


def differing(a: State, b: State) -> list[tuple[str, str]]:
    """Where two states have not the same bits."""
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def config_of(*overrides: str) -> RunConfig:
    """A small config whose checkpoint section is changed."""
    return small_config(*(f"checkpoint.{override}" for override in overrides))


def count_reads(patch: pytest.MonkeyPatch) -> list[int]:
    """What each `os.preadv` from here on has returned: it is done, and counted."""
    counts: list[int] = []
    preadv = os.preadv

    def counted(handle: int, buffers: Sequence[memoryview], at: int) -> int:
        counts.append(preadv(handle, buffers, at))
        return counts[-1]

    patch.setattr(os, "preadv", counted)
    return counts


def truncate(path: Path) -> None:
    """Cut the last byte off."""
    path.write_bytes(path.read_bytes()[:-1])


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def older(checkpoint: Path) -> Path:
    """The checkpoint of the step before, whole: it has files of the same sizes."""
    return checkpoint_path(checkpoint.parent, int(checkpoint.name.removeprefix("step_")) - 1)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "value": (lambda path: flip_bit(path / RANK_FILE, -40), f"{RANK_FILE} is damaged: block"),
    "hash": (lambda path: flip_bit(path / RANK_FILE, -1), "its header does not match its hash"),
    "header": (lambda path: flip_bit(path / RANK_FILE, 20), "its header does not match its hash"),
    "length": (lambda path: flip_bit(path / RANK_FILE, 6), "its header is longer than the file"),
    "cut": (lambda path: truncate(path / RANK_FILE), "bytes, expected"),
    "longer": (lambda path: (path / RANK_FILE).open("ab").write(b"\0"), "bytes, expected"),
    "empty": (lambda path: (path / RANK_FILE).write_bytes(b""), "has 0 bytes, expected"),
    "no-file": (lambda path: (path / RANK_FILE).unlink(), f"{RANK_FILE} is missing, expected"),
    "other-file": (lambda path: shutil.copy(older(path) / RANK_FILE, path), "or not of this checkpoint"),
    "no-index": (lambda path: (path / "index.json").unlink(), "index.json is missing"),
    "index": (lambda path: flip_bit(path / "index.json", 500), "index.json is damaged"),
    "index-cut": (lambda path: truncate(path / "index.json"), "index.json is damaged"),
    "index-empty": (lambda path: (path / "index.json").write_bytes(b""), "index.json is damaged"),
    "other-index": (lambda path: shutil.copy(older(path) / "index.json", path), "index.json is of step"),
    "no-tokenizer": (lambda path: (path / "tokenizer.model").unlink(), "tokenizer.model is missing"),
    "tokenizer": (lambda path: flip_bit(path / "tokenizer.model", 3), "or not the one that was saved"),
    "nothing": (empty, "index.json is missing"),
    "no-folder": (replace_by_file, "Not a directory"),
}
"""What may befall a checkpoint, and the words that say so. Each expects the checkpoint of the step before beside it."""
