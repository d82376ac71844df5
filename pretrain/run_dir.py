"""A run is a folder. This is where each thing in it lies, and how the small files are written."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class RunDir:
    """The paths of one run.

    config.yaml       the resolved config, the one a requeue uses
    environment.json  versions, git revision, host, devices
    data.json         fingerprints of the tokenizer and of each source's manifest
    tokenizer.model   a copy, so that the run can be evaluated when its data is gone; or tokenizer.json with
                      tokenizer_config.json
    events.jsonl      one JSON object a line: environment, start, peak, stage, left_out, step, evaluation, checkpoint,
                      checkpoint_failed, expert_load, rewind, straggler, disk_low, resume, profile, end
    outcome.json      how the last attempt ended; absent while it runs
    stop, save        made by a person: checkpoint and end, or checkpoint now; removed by the run when it has done so
    checkpoints/  tensorboard/  logs/
    profile/step_N/   what --profile found from step N on: regions.json, and a trace_rank_K.json for Chrome of each rank
                      that was asked for

    Of a run that was submitted to a cluster, besides:
    job.json          how it was submitted
    job.sbatch        the script that Slurm runs
    attempts.jsonl    submissions, and each attempt's beginning, signals and end
    code/, code.json, code.diff  the code that it runs, and where that came from
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
        from data_pipeline.tokenizer_files import tokenizer_in  # a watchdog has but the standard library

        return tokenizer_in(self.path)

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def outcome_path(self) -> Path:
        return self.path / "outcome.json"

    @property
    def stop_path(self) -> Path:
        return self.path / "stop"

    @property
    def save_path(self) -> Path:
        return self.path / "save"

    @property
    def job_path(self) -> Path:
        return self.path / "job.json"

    @property
    def script_path(self) -> Path:
        return self.path / "job.sbatch"

    @property
    def attempts_path(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def lock_path(self) -> Path:
        """Locked by the launcher of the attempt that is under way."""
        return self.path / "lock"

    @property
    def ranks_lock_path(self) -> Path:
        """Locked by that attempt's ranks, together."""
        return self.path / "ranks.lock"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def profiles(self) -> Path:
        return self.path / "profile"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank:05d}.log"

    def rank_error(self, rank: int) -> Path:
        """Where a rank that fails says why, for the launcher to read."""
        return self.logs / f"rank_{rank:05d}.error.json"

    def rank_stacks(self, rank: int) -> Path:
        """Where the stacks of a rank that hangs are written."""
        return self.logs / f"rank_{rank:05d}.stacks"


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that a crash leaves the old one or the new one, whole, and the new one stays.

    Raises OSError naming the file.
    """
    scratch = path.with_name(path.name + ".tmp")
    try:
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # such as that of a full disk, which names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.replace(scratch, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """fsync a folder: a rename is durable only then."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_events(run_dir: RunDir) -> TextIO:
    """events.jsonl, to append lines to. A line that a crash cut short is ended first: it takes no other along."""
    torn = False
    if run_dir.events_path.is_file() and run_dir.events_path.stat().st_size:
        with open(run_dir.events_path, "rb") as events:
            events.seek(-1, os.SEEK_END)
            torn = events.read(1) != b"\n"
    file = open(run_dir.events_path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    if torn:
        file.write("\n")
    return file


def event_line(kind: str, event: dict[str, Any]) -> str:
    """One line of events.jsonl."""
    return json.dumps({"type": kind, **event, "time": time.time()}) + "\n"


def read_events(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The events of a run, oldest first. A last line that a crash cut short is left out."""
    with open(path, "rb") as lines:
        return [event for event in parsed_events(lines) if kind is None or event["type"] == kind]


def parsed_events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The events of lines, one by one: a long run's need not be in memory together.

    A line that is torn, or no event, is left out; and so are validations of earlier releases, which scored windows of
    the stream rather than documents: nothing can be compared with them.
    """
    for line in lines:
        try:
            event = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue
        if not isinstance(event, dict) or not {"type", "time"} <= event.keys():
            continue
        if event["type"] != "evaluation" or "by_source" in event:
            yield event


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
