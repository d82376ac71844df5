"""Starting and resuming a run: everything that can be wrong is found here, before any rank starts."""

import fcntl
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.config import SourceConfig
from data_pipeline.manifest import TOKENIZER_NAME
from launch.ranks import RanksError, StoppedError, run_ranks
from launch.run_checks import (
    check_checkpoints_are_there,
    check_data,
    check_ranks,
    check_same_data,
    check_stop_after,
    with_checked_init,
)
from pretrain.config import RunConfig
from pretrain.outcome import EXIT_FAILED, EXIT_WRONG_INPUT, Outcome
from pretrain.recipe import apply_overrides, dump_config, load_config, validated
from pretrain.resume_policy import changes, check_allowed, check_resume
from pretrain.run_dir import RunDir, event_line, open_events, read_events, read_json, write_json

RECIPES = Path(__file__).parent / "recipes"


# What a start that was killed before the config was written leaves: nothing to go on from, and nothing to lose.
BEFORE_A_RUN = {"lock", "ranks.lock", "data.json", "data.json.tmp", "tokenizer.model", "config.yaml.tmp"}


def recipe_path(recipe: str) -> Path:
    """A path, or the name of a recipe that comes with Steppe. Raises ValueError listing those."""
    path, built_in = Path(recipe), RECIPES / f"{recipe}.yaml"
    if path.is_file():
        return path
    if built_in.is_file():
        return built_in
    names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
    raise ValueError(f"{recipe}: no such file, and no recipe of that name; recipes are {names}")


def start(recipe: str, overrides: list[str], run_dir: Path, nproc: int | None, stop_after: int | None) -> Outcome:
    """`steppe train`: make the run folder and train in it. Raises ValueError if the folder holds anything already."""
    config = with_absolute_paths(load_config(recipe_path(recipe), overrides))
    run = RunDir(run_dir.resolve())
    check_new(run)
    ranks = nproc if nproc is not None else default_ranks(run)
    check_ranks(config, ranks)
    check_stop_after(stop_after)
    data = check_data(config)
    config = with_checked_init(config, data["tokenizer"])
    run.path.mkdir(parents=True, exist_ok=True)
    with locked(run):
        check_new(run)  # once more: another may have been started at the same moment
        write_json(run.data_path, data)
        shutil.copyfile(Path(config.data.sources[0].path) / TOKENIZER_NAME, run.tokenizer_path)
        dump_config(config, run.config_path)  # last: with it, the folder is a run
        return attempt(run, ranks, stop_after)


def check_new(run: RunDir) -> None:
    """Raise ValueError if there is anything in the folder already that a run could have made, or a person."""
    if run.path.exists() and not (run.path.is_dir() and {entry.name for entry in run.path.iterdir()} <= BEFORE_A_RUN):
        raise ValueError(f"{run.path} exists and is not empty: choose another --run-dir, or go on with `steppe resume`")


def resume(
    run_dir: Path, overrides: list[str], allowed: list[str], nproc: int | None, stop_after: int | None
) -> Outcome:
    """`steppe resume`: go on from the newest checkpoint, with what a resume may change changed."""
    run = RunDir(run_dir.resolve())
    if not run.config_path.is_file():
        raise ValueError(f"{run_dir} is not a run: {run.config_path.name} is missing in it")
    old = load_config(run.config_path)
    tree = apply_overrides(old.model_dump(mode="json"), overrides)
    if "preset" in tree["model"]:
        raise ValueError("model.preset: a resumed run has every field of its model already; set the fields themselves")
    new = with_absolute_paths(validated(tree))
    ranks = nproc if nproc is not None else default_ranks(run)
    differences = changes(old, new)
    check_allowed(allowed)
    check_resume(differences, allowed)
    check_ranks(new, ranks)
    check_stop_after(stop_after)
    check_checkpoints_are_there(run)
    data = check_data(new)
    known = read_json(run.data_path)
    check_same_data(known, data, allowed)
    # A source that is left out now may come back, and must then be what it was.
    data["manifests"] = known["manifests"] | data["manifests"]
    with locked(run):
        for key, (before, after) in differences.items():
            print(f"{key}: {before} becomes {after}", file=sys.stderr)
        if differences:
            dump_config(new, run.config_path)
            with open_events(run) as events:
                events.write(event_line("resume", {"changes": differences}))
        if data["tokenizer"] != known["tokenizer"]:
            shutil.copyfile(Path(new.data.sources[0].path) / TOKENIZER_NAME, run.tokenizer_path)
        write_json(run.data_path, data)
        begun = times_begun(run)
        outcome = attempt(run, ranks, stop_after)
        if times_begun(run) == begun and differences:
            # What was changed has not trained a step, perhaps because it cannot: the run stays what it was.
            dump_config(old, run.config_path)
            write_json(run.data_path, known)
            with open_events(run) as events:
                events.write(event_line("resume", {"changes": {key: (b, a) for key, (a, b) in differences.items()}}))
            print("nothing was trained: the run's config is as it was before", file=sys.stderr)
        return outcome


def times_begun(run: RunDir) -> int:
    """How many attempts came so far as to have built the model and loaded what there was to load."""
    return len(read_events(run.events_path, "start")) if run.events_path.is_file() else 0


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config with its data where it lies now: a run may be resumed from another folder."""

    def absolute(sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        return tuple(source.model_copy(update={"path": str(Path(source.path).resolve())}) for source in sources)

    data = config.data.model_copy(update={"sources": absolute(config.data.sources)})
    evaluation = config.evaluation.model_copy(update={"sources": absolute(config.evaluation.sources)})
    return config.model_copy(update={"data": data, "evaluation": evaluation})


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


@contextmanager
def locked(run: RunDir) -> Iterator[None]:
    """One attempt at a time in a run folder; the lock goes with the process, however it ends."""
    with open(run.lock_path, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Ranks outlive a launcher that is killed: they finish their step and save.
            with open(run.ranks_lock_path, "w", encoding="utf-8") as ranks_lock:
                fcntl.flock(ranks_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{run.path} is being trained in by another process: wait for it, or stop it") from None
        yield
