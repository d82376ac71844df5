"""A run's folder before any rank starts: made from a recipe, or changed for a resume, once all that can be wrong is
found. Imports no torch."""

import fcntl
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from data_pipeline.config import SourceConfig
from data_pipeline.manifest import Manifest
from data_pipeline.remote import is_local
from data_pipeline.tokenizer_files import JSON_CONFIG_NAME, TOKENIZER_NAMES, TokenizerFiles
from launch.named_file import named_file
from launch.run_checks import (
    check_checkpoints_are_there,
    check_data,
    check_same_data,
    fingerprints,
    with_checked_init,
)
from pretrain.config import RunConfig
from pretrain.ledger import check_order, state_on_record
from pretrain.recipe import apply_overrides, check_unchanged, dump_config, load_config, validated
from pretrain.resume_policy import changes, check_allowed, check_resume
from pretrain.run_dir import RunDir, event_line, open_events, read_json, write_json
from pretrain.state import TrainState

RECIPES = Path(__file__).parent / "recipes"
LOOK_AGAIN_SECONDS = 0.5
SWEEP_NAME = "sweep.json"

# What a start that was killed before the config was written leaves: nothing to go on from, and nothing to lose.
_WRITTEN_BEFORE = ("data.json", *TOKENIZER_NAMES, JSON_CONFIG_NAME)
BEFORE_A_RUN = {
    *("lock", "ranks.lock", "config.yaml.tmp"),
    *_WRITTEN_BEFORE,
    *(f"{name}.tmp" for name in _WRITTEN_BEFORE),
}


def recipe_path(recipe: str) -> Path:
    """A path, or the name of a recipe that comes with Steppe. Raises ValueError listing those."""
    return named_file(recipe, RECIPES, "recipe")


def checked_recipe(recipe: str, overrides: list[str], run: RunDir) -> RunConfig:
    """A recipe's config for a new run. Raises ValueError if it is wrong or the folder holds anything already."""
    config = with_absolute_paths(load_config(recipe_path(recipe), overrides))
    check_new(run)
    return config


@contextmanager
def new_run(config: RunConfig, run: RunDir) -> Iterator[None]:
    """Make the run's folder, and hold its lock. Raises ValueError if there is one, or its data is not as it must be."""
    manifests = check_data(config)
    data = fingerprints(config, manifests)
    print(check_order(config, TrainState(), manifests), file=sys.stderr)
    config = with_checked_init(config, data["tokenizer"])
    run.path.mkdir(parents=True, exist_ok=True)
    with locked(run):
        check_new(run)  # once more: another may have been started at the same moment
        write_json(run.data_path, data)
        _copy_tokenizer(config, manifests, run)
        dump_config(config, run.config_path)  # last: with it, the folder is a run
        yield


def _copy_tokenizer(config: RunConfig, manifests: Mapping[str, Manifest], run: RunDir) -> None:
    source = config.data.sources[0].path
    TokenizerFiles.read(f"{source}/{manifests[source].tokenizer_file}").write(run.path)


def check_new(run: RunDir) -> None:
    """Raise ValueError if there is anything in the folder already that a run could have made, or a person."""
    if run.path.exists() and not (run.path.is_dir() and {entry.name for entry in run.path.iterdir()} <= BEFORE_A_RUN):
        raise ValueError(f"{run.path} exists and is not empty: choose another --run-dir, or go on with `steppe resume`")


@dataclass(frozen=True)
class Change:
    """What a resume changes of a run: {dotted key: (old value, new value)}, and the run's data.json, with the manifests
    of its sources by path."""

    run: RunDir
    old: RunConfig
    new: RunConfig
    differences: dict[str, tuple[Any, Any]]
    known_data: dict[str, Any]
    data: dict[str, Any]
    manifests: Mapping[str, Manifest]

    def make(self, say: bool = True) -> None:
        """Write it into the run's folder, on record. The run must be `locked`. say: in a line a key, on stderr."""
        for key, (before, after) in self.differences.items() if say else ():
            print(f"{key}: {before} becomes {after}", file=sys.stderr)
        if self.differences:
            dump_config(self.new, self.run.config_path)
            self._record(self.differences)
        if self.data["tokenizer"] != self.known_data["tokenizer"]:
            _copy_tokenizer(self.new, self.manifests, self.run)
        write_json(self.run.data_path, self.data)

    def take_back(self) -> None:
        """The inverse of `make`, on record."""
        dump_config(self.old, self.run.config_path)
        write_json(self.run.data_path, self.known_data)
        self._record({key: (after, before) for key, (before, after) in self.differences.items()})

    def _record(self, differences: dict[str, tuple[Any, Any]]) -> None:
        with open_events(self.run) as events:
            events.write(event_line("resume", {"changes": differences}))


def check_run(run: RunDir) -> None:
    """Raise ValueError if the folder is not that of one run."""
    if run.config_path.is_file():
        return
    if (run.path / SWEEP_NAME).is_file():
        raise ValueError(f"{run.path} is a sweep, of several runs: name one of them, such as {first_point(run.path)}")
    why = f"{run.config_path.name} is missing in it" if run.path.is_dir() else "there is no such folder"
    raise ValueError(f"{run.path} is not a run: {why}")


def first_point(sweep: Path) -> Path:
    """The first run of a sweep."""
    return min((path.parent for path in sweep.glob("*/config.yaml")), default=sweep / "POINT")


def checked_change(run: RunDir, overrides: list[str], allowed: list[str]) -> Change:
    """What `--set` and `--allow` would change of a run. Raises ValueError if it is none, or that cannot be changed."""
    check_run(run)
    check_unchanged(run.config_path)
    old = load_config(run.config_path)
    tree = apply_overrides(old.model_dump(mode="json"), overrides)
    if "preset" in tree["model"]:
        raise ValueError("model.preset: a resumed run has every field of its model already; set the fields themselves")
    new = with_absolute_paths(validated(tree))
    differences = changes(old, new)
    check_allowed(allowed)
    check_resume(differences, allowed)
    check_checkpoints_are_there(run)
    manifests = check_data(new)
    data, known = fingerprints(new, manifests), read_json(run.data_path)
    check_same_data(known, data, allowed)
    check_order(new, state_on_record(run), manifests)
    # A source that is left out now may come back, and must then be what it was.
    data["manifests"] = known["manifests"] | data["manifests"]
    data["packs"] = known["packs"] | {name: known["packs"].get(name, {}) | bins for name, bins in data["packs"].items()}
    return Change(run, old, new, differences, known, data, manifests)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config with its data where it lies now: a run may be resumed from another folder."""

    def absolute(sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        return tuple(
            source.model_copy(update={"path": str(Path(source.path.removeprefix("file://")).resolve())})
            if is_local(source.path)
            else source
            for source in sources
        )

    data = config.data.model_copy(update={"sources": absolute(config.data.sources)})
    evaluation = config.evaluation.model_copy(update={"sources": absolute(config.evaluation.sources)})
    return config.model_copy(update={"data": data, "evaluation": evaluation})


class LockedError(ValueError):
    """Another process trains in the run's folder."""


@contextmanager
def locked(run: RunDir, patience_seconds: float = 0.0) -> Iterator[None]:
    """One attempt at a time in a run folder; the lock goes with the process, however it ends.

    Raises LockedError if another process holds it for longer than the patience, OSError where files cannot be locked.
    """
    deadline, said = time.monotonic() + patience_seconds, False
    with open(run.lock_path, "w", encoding="utf-8") as lock:
        while not _lock(run, lock):
            if time.monotonic() >= deadline:
                raise LockedError(f"{run.path} is being trained in by another process: wait for it, or stop it")
            if not said:
                print(
                    f"waiting for {run.path}, in which another process trains, for {patience_seconds:.0f} s at most",
                    file=sys.stderr,
                )
                said = True
            time.sleep(LOOK_AGAIN_SECONDS)
        yield


def _lock(run: RunDir, lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Ranks outlive a launcher that is killed: they finish their step and save.
        with open(run.ranks_lock_path, "w", encoding="utf-8") as ranks_lock:
            fcntl.flock(ranks_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        what = f"{error.strerror}: the file system must have locks (flock), or two attempts could train at once"
        raise OSError(error.errno, what, str(run.lock_path)) from error
    return True
