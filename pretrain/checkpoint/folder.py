"""The folder of a run's checkpoints: which there are, which stay, and which were found to be damaged.

step_00000100/          committed: what bears its final name was whole when it got it
step_00000200.tmp/      a save that is under way, or was cut short
step_00000150.damaged/  passed over by a resume; it stays until the run has come as far again
step_00000100.replaced.tmp/  made way for another save of its step; it gets its name back if that was cut short
latest                  a hint for people, which nothing reads
"""

import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pretrain.checkpoint.index import STEP_NAME, DamagedError, OtherVersionError, read_index
from pretrain.config import CheckpointConfig
from pretrain.run_dir import sync_folder

_DAMAGED = re.compile(r"step_(\d{8,})\.damaged")
_REPLACED = ".replaced.tmp"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_").removesuffix(".damaged"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return _named(folder, STEP_NAME)


def list_damaged(folder: Path) -> list[Path]:
    """What resumes have passed over and set aside, oldest first."""
    return _named(folder, _DAMAGED)


def _named(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if pattern.fullmatch(path.name)), key=step_of)


def whole_checkpoints(folder: Path, problems: list[Exception]) -> Iterator[Path]:
    """Committed checkpoints whose index and files are there, newest first; why others are not goes to `problems`."""
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            read_index(checkpoint)
        except (DamagedError, OtherVersionError, OSError) as error:
            problems.append(error)
        else:
            yield checkpoint


def newest_checkpoint(folder: Path, problems: list[Exception] | None = None) -> Path | None:
    """The newest of `whole_checkpoints`, None where there is no checkpoint at all. Raises what `none_is_whole` says."""
    problems = [] if problems is None else problems
    newest = next(whole_checkpoints(folder, problems), None)
    if newest is None and problems:
        raise none_is_whole(folder, problems)
    return newest


def none_is_whole(folder: Path, problems: Sequence[Exception]) -> Exception:
    """The refusal where there are checkpoints and none can be used: what was learnt is not thrown away unasked.

    An OSError if one could not be read, which may help to try again; a ValueError if all are damaged.
    """
    text = (
        f"none of the checkpoints in {folder} can be used: {'; '.join(map(str, problems))}. "
        "Restore one, or move the folder away to train from scratch"
    )
    unreadable = any(isinstance(problem, OSError) for problem in problems)
    return OSError(text) if unreadable else ValueError(text)


def kept_steps(steps: Sequence[int], config: CheckpointConfig, best: int | None) -> set[int]:
    """Which of the checkpoints of these steps, rising, stay: the last `keep`, every one that `keep_every_steps`
    divides, and the best one."""
    kept = set(steps[-config.keep :])
    if config.keep_every_steps:
        kept |= {step for step in steps if step % config.keep_every_steps == 0}
    return kept if best is None else kept | {best}


def prune_checkpoints(folder: Path, config: CheckpointConfig, losses: Mapping[int, float]) -> None:
    """Remove what need not stay, now that the newest checkpoint is committed.

    Only whole ones count as kept, so that one with a file missing never pushes out another; and nothing at all is
    removed unless the newest is whole, nor if one cannot be read, for which OSError is raised. What a resume set aside
    goes once the run has come as far again. Something that is being removed never looks like a checkpoint.
    """
    checkpoints = list_checkpoints(folder)
    newest = step_of(checkpoints[-1])
    whole: list[int] = []
    for path in reversed(checkpoints):
        if _is_whole(path):
            whole.insert(0, step_of(path))
        elif not whole:
            return
        if len(whole) == config.keep:
            break
    older = [step_of(path) for path in checkpoints if step_of(path) < whole[0]]  # rotten or not: these may go
    known = [*older, *whole]
    best = best_checkpoint(folder, known, losses) if config.keep_best else None
    kept = kept_steps(known, config, best)
    doomed = [path for path in checkpoints if step_of(path) not in kept]
    _each(remove, [*doomed, *(path for path in list_damaged(folder) if step_of(path) <= newest)])


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint's index and files are there. Raises OSError where that cannot be told."""
    try:
        read_index(checkpoint)
    except (DamagedError, OtherVersionError):
        return False
    return True


def best_checkpoint(folder: Path, steps: Sequence[int], losses: Mapping[int, float]) -> int | None:
    """The one of these steps with the lowest validation loss whose checkpoint is whole, if any."""
    measured = [step for step in steps if not math.isnan(losses.get(step, math.nan))]
    best_first = sorted(measured, key=lambda step: losses[step])
    return next((step for step in best_first if _is_whole(checkpoint_path(folder, step))), None)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint's folder, by way of a name that no one takes for a checkpoint's."""
    scratch = checkpoint.with_name(checkpoint.name + ".tmp")
    os.replace(checkpoint, scratch)
    sync_folder(checkpoint.parent)
    shutil.rmtree(scratch)


def _each(act: Callable[[Path], None], paths: Iterable[Path]) -> None:
    """Do it to every path, then raise the first OSError: one that cannot be removed keeps no other."""
    errors = []
    for path in paths:
        try:
            act(path)
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def replaced_name(checkpoint: Path) -> Path:
    """Where a checkpoint lies for the moment in which another of its step takes its place."""
    return checkpoint.with_name(checkpoint.name + _REPLACED)


def restore_replaced(folder: Path) -> None:
    """Give back its name to a checkpoint that had made way for one which then never came."""
    for replaced in folder.glob(f"step_*{_REPLACED}"):
        final = replaced.with_name(replaced.name.removesuffix(_REPLACED))
        if not final.exists():
            os.replace(replaced, final)


def remove_leftovers(folder: Path) -> None:
    """Remove what saves and removals that were cut short have left."""
    restore_replaced(folder)
    _each(lambda path: shutil.rmtree(path) if path.is_dir() else path.unlink(), folder.glob("*.tmp"))


def set_aside(*checkpoints: Path) -> None:
    """Rename damaged checkpoints, so that no resume takes them, but a person may look at them."""
    for checkpoint in checkpoints:
        target = checkpoint.with_name(checkpoint.name + ".damaged")
        if target.exists():
            shutil.rmtree(target)
        os.replace(checkpoint, target)
        sync_folder(checkpoint.parent)
