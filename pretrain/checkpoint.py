"""Checkpoints: one safetensors file a rank and one JSON index of boxes, over logical names. No pickle, no layout.

    checkpoints/step_00000100/
        rank-00000.safetensors   this rank's boxes, each under the key "<kind>/<parameter>@<offset>"
        index.json               shapes, who holds which box, sizes of the files, the trainer's state and the config

A save is atomic: everything is written and fsynced in `step_00000100.tmp/`, the index last, and the folder is renamed;
what bears its final name is whole. `latest` beside them is a hint for people.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.parameters import buffer_shapes
from pretrain.boxes import Box, common, slices
from pretrain.config import RunConfig
from pretrain.engine import Engine
from pretrain.parallel_dims import gathered
from pretrain.recipe import validated
from pretrain.run_dir import read_json, sync_folder, write_durably
from pretrain.state import TrainState

FORMAT = 1


class CheckpointError(OSError):
    """A checkpoint could not be written; the older ones are untouched."""


KEYS = {"format", "step", "config", "tokenizer_fingerprint", "trainer", "engine", "parameters", "files"}
NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class CheckpointIndex:
    """What index.json says.

    parameters  {name: {"shape": [...], "boxes": [[rank, offset, size], ...]}}
    files       {file name: bytes}
    """

    step: int
    config: RunConfig
    tokenizer_fingerprint: str
    trainer: dict[str, Any]
    engine: dict[str, Any]
    parameters: dict[str, Any]
    files: dict[str, int]

    @property
    def model(self) -> ModelConfig:
        return self.config.model


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step_{step:08d}"


def _tensor_key(kind: str, name: str, offset: Any) -> str:
    return f"{kind}/{name}@{','.join(map(str, offset))}"


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


# ------------------------------------------------------------------------------------------------- saving


def save_checkpoint(
    folder: Path,
    engine: Engine,
    state: TrainState,
    config: RunConfig,
    tokenizer_fingerprint: str,
    group: dist.ProcessGroup | None,
) -> Path:
    """Write the checkpoint of this step and commit it. Collective over `group` (None: a single rank).

    All but the newest `config.checkpoint.keep` are removed then. Raises CheckpointError on every rank if any rank could
    not write its part; the older checkpoints are untouched in that case.
    """
    final = checkpoint_path(folder, state.step)
    scratch = final.with_name(final.name + ".tmp")
    rank = dist.get_rank(group) if group else 0
    pieces = [piece for piece in engine.pieces() if piece.writer]
    plan = [(piece.name, piece.shape, piece.box.offset, piece.box.size) for piece in pieces]

    def prepare() -> None:
        for leftover in folder.glob("*.tmp"):  # of saves and removals that were cut short
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        scratch.mkdir(parents=True)

    def write() -> int:
        tensors = {
            _tensor_key(kind, piece.name, piece.box.offset): view.cpu().contiguous()
            for piece in pieces
            for kind, view in piece.views.items()
        }
        path = scratch / _rank_file(rank)
        save_file(tensors, path)
        os.chmod(path, 0o644)  # safetensors creates files that only their owner may read
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        return path.stat().st_size

    def commit(everyone: list[Any]) -> None:
        parameters: dict[str, Any] = {}
        for owner, (boxes, _) in enumerate(everyone):
            for name, shape, offset, size in boxes:
                entry = parameters.setdefault(name, {"shape": shape, "boxes": []})
                entry["boxes"].append((owner, offset, size))
        index = {
            "format": FORMAT,
            "step": state.step,
            "trainer": state.state_dict(),
            "engine": engine.scalars(),
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "config": config.model_dump(mode="json"),
            "files": {_rank_file(owner): size for owner, (_, size) in enumerate(everyone)},
            "parameters": parameters,
        }
        write_durably(scratch / "index.json", json.dumps(index))
        sync_folder(scratch)
        shutil.rmtree(final, ignore_errors=True)  # a checkpoint of this step that a resumed run makes again
        os.replace(scratch, final)
        sync_folder(folder)
        write_durably(folder / "latest", final.name + "\n")
        prune_checkpoints(folder, state.step, config.checkpoint.keep)

    _together(group, lambda: prepare() if rank == 0 else None)
    everyone = _together(group, lambda: (plan, write()))
    _together(group, lambda: commit(everyone) if rank == 0 else None)
    return final


def _together(group: dist.ProcessGroup | None, act: Any) -> list[Any]:
    """Run `act` on every rank and gather the results; if it fails anywhere, raise everywhere."""
    try:
        mine: Any = (act(), None)
    except OSError as error:
        mine = (None, f"{error.filename or ''} {error.strerror or error}".strip())
    except SafetensorError as error:  # how it reports a full disk
        mine = (None, str(error))
    outcomes = gathered(mine, group)
    for rank, (_, failure) in enumerate(outcomes):
        if failure:
            raise CheckpointError(f"rank {rank} could not write the checkpoint: {failure}")
    return [result for result, _ in outcomes]


def prune_checkpoints(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`, the one just saved.

    A later one was passed over when this run resumed before it (it is torn, or belongs to an abandoned future), so it
    goes, too. One that is being removed never looks like a whole one.
    """
    checkpoints = list_checkpoints(folder)
    lived = [path for path in checkpoints if _step_of(path) <= step]
    for old in [*lived[:-keep], *checkpoints[len(lived) :]]:
        doomed = old.with_name(old.name + ".tmp")
        os.replace(old, doomed)
        shutil.rmtree(doomed)


# ------------------------------------------------------------------------------------------------- reading


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if NAME.fullmatch(path.name)), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def newest_checkpoint(folder: Path, passed_over: list[str] | None = None) -> Path | None:
    """The newest committed checkpoint that is whole, or None; why newer ones are not is added to `passed_over`.

    Raises ValueError if there are checkpoints and none is whole: what was learnt is not to be thrown away unasked.
    """
    passed_over = [] if passed_over is None else passed_over
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            read_index(checkpoint)
        except ValueError as error:
            passed_over.append(str(error))
        else:
            return checkpoint
    if passed_over:
        raise ValueError(
            f"none of the checkpoints in {folder} can be used: {'; '.join(passed_over)}. "
            "Restore one, or move the folder away to train from scratch"
        )
    return None


def read_index(checkpoint: Path) -> CheckpointIndex:
    """Read and check index.json. Raises ValueError if it, or any file it names, is missing or of the wrong size."""
    raw = read_json(checkpoint / "index.json")
    if not isinstance(raw, dict) or not raw.keys() >= KEYS:
        raise ValueError(f"{checkpoint / 'index.json'} is not a checkpoint's index: it lacks {', '.join(sorted(KEYS))}")
    if raw["format"] != FORMAT:
        raise ValueError(f"{checkpoint} has checkpoint format {raw.get('format')}, this version reads {FORMAT}")
    for name, size in raw["files"].items():
        path = checkpoint / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise ValueError(f"{path} {found}, expected {size} bytes: use another checkpoint")
    return CheckpointIndex(
        step=raw["step"],
        config=validated(raw["config"]),
        tokenizer_fingerprint=raw["tokenizer_fingerprint"],
        trainer=raw["trainer"],
        engine=raw["engine"],
        parameters=raw["parameters"],
        files=raw["files"],
    )


class _Reader:
    """Opens each rank's file once, and copies what is stored of a wanted box into a tensor."""

    def __init__(self, checkpoint: Path, index: CheckpointIndex) -> None:
        self.checkpoint, self.index = checkpoint, index
        self.files: dict[int, Any] = {}

    def read(self, name: str, shape: tuple[int, ...], wanted: Box, into: dict[str, Tensor]) -> None:
        """Fill `into[kind]` (tensors of the wanted box's size). Raises ValueError where the checkpoint lacks a part."""
        entry = self.index.parameters.get(name)
        if entry is None or tuple(entry["shape"]) != shape:
            stored = "nothing" if entry is None else f"shape {entry['shape']}"
            raise ValueError(f"{self.checkpoint} holds {stored} for {name}, the model's config says {list(shape)}")
        found = 0
        for owner, offset, size in entry["boxes"]:
            stored_box = Box(tuple(offset), tuple(size))
            part = common(wanted, stored_box)
            if part is None:
                continue
            if owner not in self.files:
                self.files[owner] = safe_open(self.checkpoint / _rank_file(owner), "pt")
            for kind, tensor in into.items():
                stored_slice = self.files[owner].get_slice(_tensor_key(kind, name, offset))
                tensor[slices(part, wanted)] = stored_slice[slices(part, stored_box)].to(tensor.device)
            found += part.numel
        if found != wanted.numel:
            raise ValueError(f"{self.checkpoint} covers {found} of {wanted.numel} values of {name}: it is damaged")


def load_checkpoint(checkpoint: Path, engine: Engine, group: dist.ProcessGroup | None = None) -> TrainState:
    """Load into an engine of any layout, in place. Collective over `group` (None: a single rank).

    Raises ValueError on every rank if any finds a value of its state not covered, or a file damaged.
    """
    index, failure = read_index(checkpoint), None
    reader = _Reader(checkpoint, index)
    try:
        with torch.no_grad():
            for piece in engine.pieces():
                reader.read(piece.name, piece.shape, piece.box, piece.views)
    except (ValueError, OSError, SafetensorError) as error:
        failure = f"{checkpoint} cannot be loaded: {error}"
    failures = [found for found in gathered(failure, group) if found is not None]
    if failures:
        raise ValueError(failures[0])
    engine.restored(index.engine)
    return TrainState.from_state_dict(index.trainer)


def read_weights(checkpoint: Path, kind: str = "fp32") -> dict[str, Tensor]:
    """The fp32 weights under their logical names, whole, on the CPU: what evaluation and export need.

    kind: another kind of state, such as `exp_avg`, of the parameters; buffers have none.
    """
    index = read_index(checkpoint)
    reader = _Reader(checkpoint, index)
    weights = {}
    for name, entry in index.parameters.items():
        if kind != "fp32" and name in buffer_shapes(index.model):
            continue
        shape = tuple(entry["shape"])
        weights[name] = torch.empty(shape)
        reader.read(name, shape, Box((0,) * len(shape), shape), {kind: weights[name]})
    return weights
