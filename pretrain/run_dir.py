"""A run is a folder. This is where each thing in it lies, and how the small files are written."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunDir:
    """The paths of one run.

    config.yaml       the resolved config, the one a requeue uses
    environment.json  versions, git revision, host, devices
    data.json         fingerprints of the tokenizer and of each source's manifest
    tokenizer.model   a copy, so that the run can be evaluated when its data is gone
    events.jsonl      one JSON object a line: start, step, evaluation, checkpoint, resume, end
    outcome.json      how the last attempt ended; absent while it runs
    checkpoints/  tensorboard/  logs/
    """

    path: Path

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment_path(self) -> Path:
        return self.path / "environment.json"

    @property
    def data_path(self) -> Path:
        return self.path / "data.json"

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer.model"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def outcome_path(self) -> Path:
        return self.path / "outcome.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank:05d}.log"

    def rank_error(self, rank: int) -> Path:
        """Where a rank that fails says why, for the launcher to read."""
        return self.logs / f"rank_{rank:05d}.error.json"


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that a crash leaves the old one or the new one, whole, and the new one stays."""
    scratch = path.with_name(path.name + ".tmp")
    with open(scratch, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """fsync a folder: a rename is durable only then."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def event_line(kind: str, event: dict[str, Any]) -> str:
    """One line of events.jsonl."""
    return json.dumps({"type": kind, **event, "time": time.time()}) + "\n"


def write_json(path: Path, value: Any) -> None:
    """`write_durably` of an indented JSON object."""
    write_durably(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises ValueError naming the file if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
