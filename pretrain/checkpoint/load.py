"""Loading a checkpoint into an engine of any layout: the newest that verifies, and the same one on every rank."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.boxes import Piece
from pretrain.checkpoint.folder import list_checkpoints, none_is_whole, restore_replaced, set_aside
from pretrain.checkpoint.index import INDEX_NAME, CheckpointIndex, DamagedError, checked_index, parse_index
from pretrain.checkpoint.read import CheckpointReader
from pretrain.engine import Engine
from pretrain.parallel_dims import first_of, gathered
from pretrain.state import TrainState


@dataclass(frozen=True)
class Restored:
    """What a run goes on from: `checkpoint`, or the seed where that is None; and why newer ones were passed over."""

    state: TrainState
    checkpoint: Path | None
    passed_over: list[str] = field(default_factory=list)


def load_newest(folder: Path, engine: Engine, group: dist.ProcessGroup | None) -> Restored:
    """Load the newest checkpoint that verifies, and set aside those that do not. Collective over `group`.

    The first rank chooses and hands the index round, so that all load the same: on a network file system the others
    may see an older folder, and an index need not be read by a thousand. Then each rank verifies what it reads, and
    if any finds damage, all go on to the checkpoint before.
    Raises ValueError on every rank if there are checkpoints and none can be used, or the newest is of another model or
    version; OSError if a damaged one cannot be set aside.
    """
    passed_over: list[str] = []
    aside: list[Path] = []
    first_of(lambda: restore_replaced(folder), group)
    candidates = _candidates(folder, passed_over, aside)
    while (choice := first_of(lambda: next(candidates, None), group)) is not None:
        checkpoint, index = choice[0], parse_index(choice[1], choice[0] / INDEX_NAME)
        trainer, scalars = _progress(index, checkpoint)
        damage = _fill(CheckpointReader(checkpoint, index), engine.pieces(), group)
        if damage is None:
            first_of(lambda: set_aside(*aside), group)
            engine.restored(scalars)
            return Restored(TrainState.from_state_dict(trainer), checkpoint, passed_over)
        passed_over.append(damage)
        aside.append(checkpoint)
    reasons = first_of(lambda: passed_over, group)
    if reasons:
        raise none_is_whole(folder, reasons)
    return Restored(TrainState(), None)


def load_checkpoint(checkpoint: Path, engine: Engine, group: dist.ProcessGroup | None = None) -> TrainState:
    """Load one checkpoint, in place. Collective over `group` (None: a single rank).

    Raises ValueError on every rank if the model is another, DamagedError if any finds a value missing or damaged.
    """
    index = _agreed_index(checkpoint, group)
    trainer, scalars = _progress(index, checkpoint)
    damage = _fill(CheckpointReader(checkpoint, index), engine.pieces(), group)
    if damage is not None:
        raise DamagedError(damage)
    engine.restored(scalars)
    return TrainState.from_state_dict(trainer)


def load_initial_weights(checkpoint: Path, engine: Engine, group: dist.ProcessGroup | None) -> None:
    """Load only the weights, of any run's checkpoint or an imported one, into an engine at step 0. Collective.

    Raises ValueError on every rank if the model is another, DamagedError if any finds a value missing or damaged.
    """
    weights = [Piece(p.name, p.shape, p.box, p.writer, {"fp32": p.views["fp32"]}) for p in engine.pieces()]
    damage = _fill(CheckpointReader(checkpoint, _agreed_index(checkpoint, group)), weights, group)
    if damage is not None:
        raise DamagedError(damage)
    engine.restored(engine.scalars())


def _candidates(folder: Path, passed_over: list[str], aside: list[Path]) -> Iterator[tuple[Path, bytes]]:
    """Committed checkpoints, newest first, with the bytes of their indices, which are whole."""
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            _, raw = checked_index(checkpoint)
        except (DamagedError, OSError) as error:
            passed_over.append(str(error))
            aside.append(checkpoint)
        else:
            yield checkpoint, raw


def _agreed_index(checkpoint: Path, group: dist.ProcessGroup | None) -> CheckpointIndex:
    """The index that the first rank has read, on every rank."""
    return parse_index(first_of(lambda: checked_index(checkpoint)[1], group), checkpoint / INDEX_NAME)


def _fill(reader: CheckpointReader, pieces: list[Piece], group: dist.ProcessGroup | None) -> str | None:
    """Fill every rank's pieces; returns what is damaged, if any rank found something to be. Collective.

    Raises ValueError on every rank where the model is another.
    """
    damage = misfit = None
    try:
        with reader:
            reader.fill(pieces)
    except (DamagedError, OSError) as error:
        damage = str(error)
    except ValueError as error:
        misfit = f"{reader.checkpoint} does not fit: {error}"
    verdicts = gathered((misfit, damage), group)
    for found, _ in verdicts:
        if found is not None:
            raise ValueError(found)
    return next((found for _, found in verdicts if found is not None), None)


def _progress(index: CheckpointIndex, checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trainer's and the engine's state besides tensors. Raises ValueError where there is none to go on from."""
    if index.trainer is None or index.engine is None:
        raise ValueError(f"{checkpoint} holds weights alone: start a run from it with --set init_from={checkpoint}")
    return index.trainer, index.engine
