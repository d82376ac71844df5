"""Starting and resuming a run on this machine, and what an attempt at it came to."""

import sys
from pathlib import Path
from typing import Any

from launch.ranks import RanksError, StoppedError, run_ranks
from launch.run_checks import check_device, check_ranks, check_stop_after
from launch.run_folder import checked_change, checked_recipe, locked, new_run
from pretrain.outcome import EXIT_FAILED, EXIT_WRONG_INPUT, Outcome
from pretrain.run_dir import RunDir, read_events, read_json


def start(recipe: str, overrides: list[str], run_dir: Path, nproc: int | None, stop_after: int | None) -> Outcome:
    """`steppe train`: make the run folder and train in it. Raises ValueError if the folder holds anything already."""
    run = RunDir(run_dir.resolve())
    config = checked_recipe(recipe, overrides, run)
    ranks = nproc if nproc is not None else default_ranks(run)
    check_ranks(config, ranks)
    check_device(config, ranks)
    check_stop_after(stop_after)
    with new_run(config, run):
        return attempt(run, ranks, stop_after)


def resume(
    run_dir: Path, overrides: list[str], allowed: list[str], nproc: int | None, stop_after: int | None
) -> Outcome:
    """`steppe resume`: go on from the newest checkpoint, with what a resume may change changed."""
    run = RunDir(run_dir.resolve())
    change = checked_change(run, overrides, allowed)
    ranks = nproc if nproc is not None else default_ranks(run)
    check_ranks(change.new, ranks)
    check_device(change.new, ranks)
    check_stop_after(stop_after)
    with locked(run):
        change.make()
        begun = times_begun(run)
        outcome = attempt(run, ranks, stop_after)
        if times_begun(run) == begun and change.differences:
            # What was changed has not trained a step, perhaps because it cannot: the run stays what it was.
            change.take_back()
            print("nothing was trained: the run's config is as it was before", file=sys.stderr)
        return outcome


def times_begun(run: RunDir) -> int:
    """How many attempts came so far as to have built the model and loaded what there was to load."""
    return len(read_events(run.events_path, "start")) if run.events_path.is_file() else 0


def attempt(run: RunDir, nproc: int, stop_after: int | None) -> Outcome:
    """Start the ranks and read how they ended."""
    run.logs.mkdir(exist_ok=True)
    print(f"starting {nproc} rank{'s' * (nproc > 1)}", file=sys.stderr)
    for stale in (run.outcome_path, *run.logs.glob("*.error.json")):
        stale.unlink(missing_ok=True)
    args = [str(run.path), *([] if stop_after is None else ["--stop-after", str(stop_after)])]
    try:
        run_ranks("pretrain.worker", args, nproc)
    except (RanksError, StoppedError) as error:
        if not run.outcome_path.is_file():
            outcome = failure(run, error)
            outcome.write(run)
            return outcome
    return Outcome.read(run)


def failure(run: RunDir, error: RanksError | StoppedError) -> Outcome:
    """What went wrong, in one line: the user's own mistake first, then a rank that was killed, then what a rank said.

    A rank whose peer vanished complains too, with a RuntimeError of the network's.
    """
    said: list[tuple[Path, dict[str, Any]]] = [(path, read_json(path)) for path in run.logs.glob("*.error.json")]
    said.sort(key=lambda item: (item[1]["exit_code"] != EXIT_WRONG_INPUT, item[1]["type"] == "RuntimeError", item[0]))
    killed = isinstance(error, RanksError) and error.killed_by is not None
    if not said or (killed and said[0][1]["type"] == "RuntimeError"):
        return Outcome("failed", EXIT_FAILED, last_step(run), f"{error}; go on with: steppe resume {run.path}")
    path, first = said[0]
    message = " ".join(first["message"].split())
    if first["type"] == "CheckpointError":
        message += f"; put that right, then go on from the checkpoint before with: steppe resume {run.path}"
    elif first["exit_code"] != EXIT_WRONG_INPUT and first["type"] != "OSError":
        log = path.with_name(path.name.replace(".error.json", ".log"))
        message = f"{first['type']}: {message} (traceback in {log})"
    return Outcome("failed", first["exit_code"], last_step(run), message)


def last_step(run: RunDir) -> int:
    """The last step that was made, 0 if none was."""
    steps = read_events(run.events_path, "step") if run.events_path.is_file() else []
    return steps[-1]["step"] if steps else 0


def default_ranks(run: RunDir) -> int:
    """As many ranks as the last attempt had; if none came so far as to say, one a GPU, one where there is none."""
    if run.environment_path.is_file():
        return read_json(run.environment_path)["ranks"]
    from pretrain.device import device_count

    return device_count()
