"""The folder of an evaluation: what was asked, what each document scored, and what is to be known of the whole.

request.json  what decides the scores; only the same request goes on in the folder
records/      the documents' scores, see `pretrain.evaluation.record`
facts.json    written when all documents are scored
lock          held by the command that writes
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from data_pipeline.file_locks import try_lock
from pretrain.run_dir import read_json, write_json

REQUEST_NAME = "request.json"
FACTS_NAME = "facts.json"
LOCK_NAME = "lock"


@dataclass(frozen=True)
class Cost:
    """Of the sitting that finished an evaluation: what an earlier one had scored is no part of it.

    seconds: from the first document read to the last one scored. peak_memory_bytes: of the rank that held most.
    """

    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    ranks: int


@dataclass(frozen=True)
class Facts:
    """The conventions of an evaluation, without which its numbers cannot be compared, and what it took.

    window: targets at once, "document" for all of a document's; stride: targets between two windows, None then.
    start_token: what the first token of a document is given: "bos", or "eos" for a tokenizer without BOS.
    eos_scored: False for a tokenizer without EOS, where nothing tells that a document ends.
    tokenizer: its fingerprint. context_length: tokens that the model was trained to see at once.
    domains: in the order of reading. notes: what else a reader of the numbers should know, in sentences.
    """

    model: str
    step: int | None
    passed_over: tuple[str, ...]
    precision: str
    offload: str | None
    window: int | Literal["document"]
    stride: int | None
    context_length: int
    start_token: str
    eos_scored: bool
    tokenizer: str
    domains: tuple[str, ...]
    notes: tuple[str, ...]
    cost: Cost


def write_facts(folder: Path, facts: Facts) -> None:
    """Say that all documents of the evaluation are scored."""
    write_json(folder / FACTS_NAME, asdict(facts))


def is_finished(folder: Path) -> bool:
    """Whether all documents of the evaluation are scored."""
    return (folder / FACTS_NAME).is_file()


def read_facts(folder: Path) -> Facts:
    """Of a finished evaluation. Raises ValueError for a folder that holds none."""
    if not is_finished(folder):
        if (folder / REQUEST_NAME).is_file():
            raise ValueError(
                f"{folder} holds an evaluation that was interrupted: finish it by the command that began it"
            )
        raise ValueError(f"{folder} holds no evaluation: expected what `steppe eval --out` leaves")
    values = read_json(folder / FACTS_NAME)
    lists = {name: tuple(values[name]) for name in ("passed_over", "domains", "notes")}
    return Facts(**values | lists | {"cost": Cost(**values["cost"])})


def check_request(folder: Path, request: Mapping[str, Any]) -> None:
    """Raise ValueError if the folder holds the evaluation of another request, naming what differs first."""
    if not (folder / REQUEST_NAME).is_file():
        return
    known, asked = (dict(_leaves(values)) for values in (read_json(folder / REQUEST_NAME), request))
    for name in [*asked, *known]:
        if known.get(name) != asked.get(name):
            raise ValueError(
                f"{folder} holds an evaluation with {name}={known.get(name)}, and this one has {asked.get(name)}: name "
                "another folder with --out, or remove that one"
            )


def write_request(folder: Path, request: Mapping[str, Any]) -> None:
    """Begin an evaluation, or go on with the same one."""
    write_json(folder / REQUEST_NAME, dict(request))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and keep other processes from writing to it meanwhile.

    Raises ValueError if one does, or if the folder cannot be made or holds other things than an evaluation.
    """
    descriptor = _opened_lock(folder)
    try:
        if not try_lock(descriptor):
            raise ValueError(f"another evaluation is writing to {folder}: wait for it, or name another folder")
        yield
    finally:
        os.close(descriptor)


def _opened_lock(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / LOCK_NAME).is_file():
            raise ValueError(f"--out {folder} holds something else than an evaluation: name a new folder")
        return os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"--out {folder}: no evaluation can be kept there: {error.strerror}") from error


def _leaves(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The plain values of a JSON value by their dotted names."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from _leaves(value, f"{name}.{key}" if name else key)
    elif isinstance(values, list | tuple) and values:
        for at, value in enumerate(values):
            yield from _leaves(value, f"{name}[{at}]")
    else:
        yield name, values
