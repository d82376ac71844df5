"""Which checkpoint a user means who names a folder, and perhaps a step."""

from pathlib import Path
from typing import Literal

from pretrain.checkpoint.folder import (
    best_checkpoint,
    checkpoint_path,
    list_checkpoints,
    newest_checkpoint,
    step_of,
)
from pretrain.checkpoint.index import INDEX_NAME
from pretrain.run_dir import RunDir

Step = int | Literal["best"] | None
"""Of a run's checkpoints: that of a step, the one of the lowest validation loss, or (None) the newest."""


def checkpoint_of(target: Path, step: Step, problems: list[Exception]) -> Path:
    """The checkpoint that a folder is, or of a run's folder the one of `step`.

    problems: why newer ones were passed over is added to them. Raises ValueError if there is none.
    """
    run = RunDir(target)
    if not run.config_path.is_file():
        if step is not None:
            raise ValueError(f"--step {step}: only a run has several steps, and {target} has no config.yaml")
        if not (target / INDEX_NAME).is_file():
            raise no_checkpoint(target)
        return target
    if step is None:
        newest = newest_checkpoint(run.checkpoints, problems)
        if newest is None:
            raise no_checkpoint(target)
        return newest
    if step == "best":
        return _best_of(run)
    chosen = checkpoint_path(run.checkpoints, step)
    if not chosen.is_dir():
        raise ValueError(f"--step {step}: {target} has no checkpoint of that step, it keeps {_kept(run)}")
    return chosen


def no_checkpoint(target: Path) -> ValueError:
    """What is to be said of a path in which there is no checkpoint."""
    if not target.exists():
        return ValueError(f"{target} does not exist")
    run = RunDir(target)
    if run.config_path.is_file():
        return ValueError(f"{target} is a run without a checkpoint: there is none in {run.checkpoints}")
    if (target / "config.json").is_file():
        return ValueError(f"{target} is a Hugging Face folder: make a checkpoint of it with `steppe import`")
    if list_checkpoints(target):
        return ValueError(f"{target} is the folder of a run's checkpoints: name the run, or one of them")
    return ValueError(f"{target} is neither a run (config.yaml) nor a checkpoint ({INDEX_NAME})")


def _best_of(run: RunDir) -> Path:
    """The whole checkpoint with the lowest mean validation loss at its step."""
    from pretrain.validation import past_losses  # and with it the engine, which nothing else here needs

    losses = past_losses(run)
    if not losses:
        raise ValueError(f"--step best: {run.path} was never validated: name a step, it keeps {_kept(run)}")
    steps = [step_of(path) for path in list_checkpoints(run.checkpoints)]
    best = best_checkpoint(run.checkpoints, steps, losses)
    if best is None:
        raise ValueError(
            f"--step best: of the steps at which {run.path} was validated it keeps no whole checkpoint: name a step, "
            f"it keeps {_kept(run)}"
        )
    return checkpoint_path(run.checkpoints, best)


def _kept(run: RunDir) -> str:
    return ", ".join(str(step_of(path)) for path in list_checkpoints(run.checkpoints)) or "none"
