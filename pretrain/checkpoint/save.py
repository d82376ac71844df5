"""Saving while training goes on: staged, written, hashed, fsynced, committed by one rename, or not there at all.

A save is a thread on each rank. It copies the rank's part to host memory (staging, which alone the next update waits
for), writes it to `step_N.tmp/`, and meets the others; the first rank then writes the index, renames the folder and
removes what need not stay. If any rank fails, all know, and the older checkpoints are untouched.
"""

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.checkpoint.commit import commit, copy_tokenizer
from pretrain.checkpoint.folder import checkpoint_path, prune_checkpoints, remove_leftovers
from pretrain.checkpoint.index import (
    CheckpointIndex,
    StoredFile,
    packed_boxes,
    rank_file_name,
    stored_parameters,
)
from pretrain.checkpoint.rank_file import BLOCK_BYTES, tensor_key, write_rank_file
from pretrain.config import RunConfig
from pretrain.device import CopyStream
from pretrain.engine import Engine
from pretrain.parallel_dims import gathered, gathered_by_first
from pretrain.run_dir import sync_folder, write_durably
from pretrain.state import TrainState


class CheckpointError(OSError):
    """A checkpoint could not be written; the older ones are untouched."""


@dataclass(frozen=True)
class Saved:
    """How a save went.

    failure: None if the checkpoint is committed. note: what went wrong besides.
    stall_seconds: for how long training waited for it. seconds: from its beginning until it was durable, or had failed.
    size_bytes: of all ranks, on the first.
    """

    step: int
    path: Path
    failure: str | None
    note: str | None
    stall_seconds: float
    seconds: float
    size_bytes: int


class CheckpointSaver:
    """Saves checkpoints of a run, one at a time. `start`, `wait` and `close` are called by all ranks alike.

    group: for this alone, since it is used beside training, and more patient than any disk is slow; None on one rank.
    losses: validation losses by step, for `keep_best`; on the first rank, whose own additions are seen.
    report: told of every save that is over, by the thread that trains.
    alive: called, by the thread of the save, whenever another tensor is about to be written.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        config: RunConfig,
        tokenizer: Path | None,
        group: dist.ProcessGroup | None,
        losses: Mapping[int, float] | None = None,
        report: Callable[[Saved], None] = lambda saved: None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.engine, self.config, self.tokenizer, self.group = folder, engine, config, tokenizer, group
        self.losses, self.report, self.alive = {} if losses is None else losses, report, alive
        self.rank = dist.get_rank(group) if group else 0
        self.staging = Staging(engine.device)
        self._under_way: _Save | None = None

    def start(self, state: TrainState) -> None:
        """Begin to save what there is now, after the save before is over. Nothing may be updated until `staged`."""
        began = time.perf_counter()
        self._finish()
        save = _Save(self, state)
        if self.config.checkpoint.asynchronous:
            self.staging.mark()
            threading.Thread(target=save.run, name="checkpoint", daemon=True).start()
        else:
            save.run()
        self._under_way = save
        save.stall_seconds = time.perf_counter() - began

    def staged(self) -> None:
        """Wait until the engine's state may be updated."""
        save = self._under_way
        if save is not None and not save.staged.is_set():
            began = time.perf_counter()
            save.staged.wait()
            save.stall_seconds += time.perf_counter() - began

    def poll(self) -> None:
        """Report a save that is over by now. Raises CheckpointError if the ranks have lost touch in it: none could
        ever follow."""
        save = self._under_way
        if save is not None and save.over.is_set():
            self._finish()
            if save.out_of_touch:
                raise CheckpointError(save.failure)

    def wait(self) -> None:
        """Wait for the save under way. Raises CheckpointError on every rank if it fails."""
        saved = self._finish()
        if saved is not None and saved.failure is not None:
            raise CheckpointError(saved.failure)

    def close(self) -> None:
        """Wait for the save under way, however it ends."""
        self._finish()

    def _finish(self) -> Saved | None:
        """The save that was under way, which is over and reported now."""
        save, self._under_way = self._under_way, None
        if save is None:
            return None
        save.over.wait()
        saved = save.result()
        self.report(saved)
        return saved


def save_checkpoint(
    folder: Path,
    engine: Engine,
    state: TrainState,
    config: RunConfig,
    tokenizer: Path | None,
    group: dist.ProcessGroup | None,
) -> Path:
    """Save and wait. Collective over `group` (None: a single rank).

    Raises CheckpointError on every rank if any rank could not write its part.
    """
    saver = CheckpointSaver(folder, engine, config, tokenizer, group)
    saver.start(state)
    saver.wait()
    return checkpoint_path(folder, state.step)


class Staging:
    """Host memory for a rank's part of a checkpoint, kept from one save to the next, in pieces of a power of two."""

    PIECE = 64 << 20  # fp32 values: 256 MiB

    def __init__(self, device: torch.device) -> None:
        self._stream = CopyStream(device)
        self._pieces: list[Tensor] = []

    def mark(self) -> None:
        """What has been asked of the device so far is what `copied` will find done."""
        self._stream.mark()

    def copied(self, views: list[Tensor]) -> list[Tensor]:
        """The views' values one after the other, in memory that the next call writes over."""
        total = sum(view.numel() for view in views)
        while len(self._pieces) * self.PIECE < total:
            self._pieces.append(self._stream.host_memory(min(self.PIECE, total - len(self._pieces) * self.PIECE)))
        at = 0
        with self._stream.copying():
            for view in views:
                values = view.reshape(-1)
                while len(values):
                    piece, offset = divmod(at, self.PIECE)
                    room = self._pieces[piece][offset : offset + len(values)]
                    room.copy_(values[: len(room)], non_blocking=True)
                    at, values = at + len(room), values[len(room) :]
        return self._pieces


class _Save:
    """One save of one rank, from its beginning on."""

    def __init__(self, saver: CheckpointSaver, state: TrainState) -> None:
        self.began, self.seconds, self.stall_seconds, self.size_bytes = time.perf_counter(), 0.0, 0.0, 0
        self.saver, self.step = saver, state.step
        self.path = checkpoint_path(saver.folder, state.step)
        self.scratch = self.path.with_name(self.path.name + ".tmp")
        # Small, and as they are now: both go on with the next step.
        self.trainer, self.scalars = state.state_dict(), saver.engine.scalars()
        self.sequence_length = state.stages[-1].sequence_length if state.stages else None  # None: nothing read yet
        self.pieces = [piece for piece in saver.engine.pieces() if piece.writer]
        self.staged, self.over = threading.Event(), threading.Event()
        self.failure: str | None = None
        self.out_of_touch = False  # the failure is of the ranks' talk, and not one that they have agreed on
        self.note: str | None = None

    def run(self) -> None:
        """Save; how it went is in `failure`."""
        try:
            self._save()
        except Exception as error:  # training may go on, and the next save may do better
            self.failure = str(error) or type(error).__name__
            self.out_of_touch = not isinstance(error, CheckpointError)
        finally:
            self.seconds = time.perf_counter() - self.began
            self.staged.set()
            self.over.set()

    def result(self) -> Saved:
        return Saved(self.step, self.path, self.failure, self.note, self.stall_seconds, self.seconds, self.size_bytes)

    def _save(self) -> None:
        try:
            self._together(self._begin)
            written = self._together(lambda: (self._boxes(), self._write()))
            everyone = gathered_by_first(written, self.saver.group)
            self._together(lambda: self._commit(everyone))
        except Exception:
            if self.saver.rank == 0:  # a disk that is full needs the room now, if only for the run's own log
                shutil.rmtree(self.scratch, ignore_errors=True)
            raise
        if self.saver.rank == 0:
            self._tidy()

    def _begin(self) -> None:
        """Take the values, all of them now if training goes on meanwhile, else one by one when they are written."""
        views = [view for piece in self.pieces for view in piece.views.values()]
        if self.saver.config.checkpoint.asynchronous:
            self.values: Iterable[Tensor] = self.saver.staging.copied(views)
            self.staged.set()
        else:
            self.values = (view.cpu() for view in views)
        if self.saver.rank == 0:
            self._prepare()

    def _boxes(self) -> bytes:
        return packed_boxes(self.saver.rank, ((piece.name, piece.shape, piece.box) for piece in self.pieces))

    def _prepare(self) -> None:
        if not self.saver.folder.is_dir():
            self.saver.folder.mkdir(parents=True)
            sync_folder(self.saver.folder.parent)
        try:
            remove_leftovers(self.saver.folder)
        except OSError as error:
            if self.scratch.exists():
                raise
            self.note = f"but before: {error}"
        self.scratch.mkdir()

    def _write(self) -> StoredFile:
        entries = [(tensor_key(kind, p.name, p.box), p.box.size) for p in self.pieces for kind in p.views]
        return write_rank_file(self.scratch / rank_file_name(self.saver.rank), entries, self._values_one_by_one())

    def _values_one_by_one(self) -> Iterator[Tensor]:
        for values in self.values:
            self.saver.alive()  # a slow disk is none that hangs
            yield values

    def _commit(self, everyone: list[tuple[bytes, StoredFile]]) -> None:
        """Make it a checkpoint, if this is the first rank; the others only learn whether it became one."""
        if self.saver.rank != 0:
            return
        config = self.saver.config
        index = CheckpointIndex(
            step=self.step,
            model=config.model,
            sequence_length=self.sequence_length or config.data.sequence_length,
            tokenizer_fingerprint=copy_tokenizer(self.saver.tokenizer, self.scratch),
            trainer=self.trainer,
            engine=self.scalars,
            config=config,
            block_bytes=BLOCK_BYTES,
            files=[stored for _, stored in everyone],
            parameters=stored_parameters(boxes for boxes, _ in everyone),
        )
        commit(self.scratch, self.path, index)
        self.size_bytes = index.size_bytes

    def _tidy(self) -> None:
        """What may fail, and it is a checkpoint nevertheless; the other ranks do not wait for it."""
        folder, config, losses = self.saver.folder, self.saver.config.checkpoint, dict(self.saver.losses)
        for act in (
            lambda: write_durably(folder / "latest", self.path.name + "\n"),
            lambda: prune_checkpoints(folder, config, losses),
        ):
            try:
                act()
            except Exception as error:
                self.note = f"but then: {error}"

    def _together(self, act: Callable[[], Any]) -> Any:
        """Run `act` on every rank; if it fails anywhere, raise everywhere."""
        try:
            mine, problem = act(), None
        except OSError as error:
            mine, problem = None, f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")
        except Exception as error:
            mine, problem = None, f"{type(error).__name__}: {error}"
        for rank, found in enumerate(gathered(problem, self.saver.group)):
            if found is not None:
                raise CheckpointError(f"rank {rank} could not write the checkpoint of step {self.step}: {found}")
        return mine
