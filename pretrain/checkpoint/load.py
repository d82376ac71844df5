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
    Raises on every rank ValueError if there are checkpoints and none can be used, or the newest is of another model or
    version; OSError if one of those could not be read, or a damaged one not be set aside: elsewhere it might be.
    """
    problems: list[Exception] = []
    aside: list[Path] = []
    first_of(lambda: restore_replaced(folder), group)
    candidates = _candidates(folder, problems, aside)
    while (choice := first_of(lambda: next(candidates, None), group)) is not None:
        checkpoint, index = choice[0], parse_index(choice[1], choice[0] / INDEX_NAME)
        state, scalars = _progress(index, checkpoint)
        problem = _fill(CheckpointReader(checkpoint, index), engine.pieces(), group)
        if problem is None:
            first_of(lambda: set_aside(*aside), group)
            engine.restored(scalars)
            return Restored(state, checkpoint, [str(problem) for problem in problems])
        problems.append(problem)
        aside.append(checkpoint)
    problems = first_of(lambda: problems, group)
    if problems:
        raise none_is_whole(folder, problems)
    return Restored(TrainState(), None)


def load_checkpoint(checkpoint: Path, engine: Engine, group: dist.ProcessGroup | None = None) -> TrainState:
    """Load one checkpoint, in place. Collective over `group` (None: a single rank).

    Raises on every rank ValueError if the model is another, DamagedError or OSError if any rank cannot have its part.
    """
    index = _agreed_index(checkpoint, group)
    state, scalars = _progress(index, checkpoint)
    problem = _fill(CheckpointReader(checkpoint, index), engine.pieces(), group)
    if problem is not None:
        raise problem
    engine.restored(scalars)
    return state


def load_initial_weights(checkpoint: Path, engine: Engine, group: dist.ProcessGroup | None) -> None:
    """Load only the weights, of any run's checkpoint or an imported one, into an engine at step 0. Collective.

    Raises on every rank ValueError if the model is another, DamagedError or OSError if any rank cannot have its part.
    """
    weights = [Piece(p.name, p.shape, p.box, p.writer, {"fp32": p.views["fp32"]}) for p in engine.pieces()]
    problem = _fill(CheckpointReader(checkpoint, _agreed_index(checkpoint, group)), weights, group)
    if problem is not None:
        raise problem
    engine.restored(engine.scalars())


def _candidates(folder: Path, problems: list[Exception], aside: list[Path]) -> Iterator[tuple[Path, bytes]]:
    """Committed checkpoints, newest first, with the bytes of their indices, which are whole."""
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            _, raw = checked_index(checkpoint)
        except (DamagedError, OSError) as error:
            problems.append(error)
            aside.append(checkpoint)
        else:
            yield checkpoint, raw


def _agreed_index(checkpoint: Path, group: dist.ProcessGroup | None) -> CheckpointIndex:
    """The index that the first rank has read, on every rank."""
    return parse_index(first_of(lambda: checked_index(checkpoint)[1], group), checkpoint / INDEX_NAME)


def _fill(reader: CheckpointReader, pieces: list[Piece], group: dist.ProcessGroup | None) -> Exception | None:
    """Fill every rank's pieces; returns the DamagedError or OSError of the first rank that met one. Collective.

    Raises ValueError on every rank where the model is another.
    """
    problem: Exception | None = None
    misfit: str | None = None
    try:
        with reader:
            reader.fill(pieces)
    except (DamagedError, OSError) as error:
        problem = error
    except ValueError as error:
        misfit = f"{reader.checkpoint} does not fit: {error}"
    verdicts = gathered((misfit, problem), group)
    for found, _ in verdicts:
        if found is not None:
            raise ValueError(found)
    return next((found for _, found in verdicts if found is not None), None)


def _progress(index: CheckpointIndex, checkpoint: Path) -> tuple[TrainState, dict[str, Any]]:
    """The trainer's and the engine's state besides tensors. Raises ValueError where there is none to go on from."""
    if index.trainer is None or index.engine is None:
        raise ValueError(f"{checkpoint} holds weights alone: start a run from it with --set init_from={checkpoint}")
    return TrainState.from_state_dict(index.trainer), index.engine
