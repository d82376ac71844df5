"""What an evaluation leaves of each document, in files that outlive a kill: `records/rank_00000.jsonl`, a file a rank.

A file is blocks of lines: a `DocumentScore` each as JSON, closed by one line {"positions": {context: [tokens, nats]}}
that sums the same documents by the context that their tokens had. A block counts once its closing line is there: what
a kill tore off is passed over by readers and cut away by the next writer, and those documents are scored again.
No order is promised: documents are scored with others of like length, and on any number of ranks.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

RECORDS_NAME = "records"
BLOCK_SECONDS = 5.0  # of work that a kill may cost
BLOCK_DOCUMENTS = 4096  # what a reader holds at once


@dataclass(frozen=True, slots=True)
class DocumentScore:
    """What a model makes of one document.

    index: its place over the whole evaluation. nats: negative log-likelihood of its `tokens` targets. bytes: of its raw
    UTF-8. words: as `wc -w` counts. text_xxh3: of that UTF-8, 16 hexadecimal digits, so that two evaluations can be
    known to be of the same documents.
    """

    index: int
    domain: str
    nats: float
    tokens: int
    bytes: int
    words: int
    text_xxh3: str


@dataclass(frozen=True, slots=True)
class PositionScore:
    """Sums over the targets before which the model saw `first` to `last` tokens of their document.

    The start token is none of the document's: `first = last = 0` are the documents' first tokens.
    """

    first: int
    last: int
    tokens: int
    nats: float


def position_of(context: np.ndarray) -> np.ndarray:
    """The number of the range of contexts in which each of these lies: 0, 1, 2-3, 4-7, ... are 0, 1, 2, 3, ..."""
    return np.frexp(context)[1]


def read_scores(folder: Path) -> Iterator[DocumentScore]:
    """The documents that an evaluation's folder holds, in no particular order, each once. Holds one block at a time."""
    for documents, _ in _blocks(folder):
        for document in documents:
            yield DocumentScore(**document)


def read_positions(folder: Path) -> list[PositionScore]:
    """The same documents' targets by context, shortest first; ranges without a target are left out."""
    tokens: dict[int, int] = {}
    nats: dict[int, list[float]] = {}
    for _, positions in _blocks(folder):
        for position, (count, total) in positions.items():
            tokens[int(position)] = tokens.get(int(position), 0) + count
            nats.setdefault(int(position), []).append(total)
    return [
        PositionScore((1 << position) >> 1, (1 << position) - 1, tokens[position], math.fsum(nats[position]))
        for position in sorted(tokens)
    ]


def _blocks(folder: Path) -> Iterator[tuple[list[dict[str, Any]], dict[str, tuple[int, float]]]]:
    """The whole blocks of all ranks: documents, and targets and nats by position."""
    for path in sorted((folder / RECORDS_NAME).glob("rank_*.jsonl")):
        documents: list[dict[str, Any]] = []
        with open(path, "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                try:
                    values = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path} is damaged ({error}): evaluate again in a new folder") from None
                if "positions" in values:
                    yield documents, values["positions"]
                    documents = []
                else:
                    documents.append(values)


def _whole_bytes(path: Path) -> int:
    """How much of a rank's file is whole blocks."""
    whole = read = 0
    with open(path, "rb") as lines:
        for line in lines:
            read += len(line)
            if line.startswith(b'{"positions"') and line.endswith(b"\n"):
                whole = read
    return whole


class DocumentSet:
    """A set of documents' indices in a bit each."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, index: int) -> bool:
        byte = index >> 3
        return byte < len(self._bits) and bool(self._bits[byte] >> (index & 7) & 1)

    def add(self, index: int) -> None:
        if index not in self:
            self._bits.extend(bytes(max(0, (index >> 3) + 1 - len(self._bits))))
            self._bits[index >> 3] |= 1 << (index & 7)
            self._count += 1


def done(folder: Path) -> tuple[DocumentSet, int]:
    """The documents that an evaluation's folder holds, and their raw UTF-8 bytes.

    Raises ValueError if it holds one twice: then nothing that is added up is right.
    """
    documents, text_bytes = DocumentSet(), 0
    for score in read_scores(folder):
        if score.index in documents:
            raise ValueError(
                f"{folder} holds document {score.index} twice, as if two evaluations had written to it at once: remove "
                "it, and evaluate anew"
            )
        documents.add(score.index)
        text_bytes += score.bytes
    return documents, text_bytes


class RecordsWriter:
    """Appends to one rank's file, a block every few seconds and one at the end, also when an exception ends it.

    Not for two processes at once: see `pretrain.evaluation.folder.locked`.
    """

    def __init__(self, folder: Path, rank: int, block_seconds: float = BLOCK_SECONDS) -> None:
        path = folder / RECORDS_NAME / f"rank_{rank:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self._written_bytes = _whole_bytes(path)
        self._block_seconds = block_seconds
        self._documents: list[DocumentScore] = []
        self._positions: dict[int, tuple[int, float]] = {}
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._write()
            os.fsync(self._descriptor)  # before anybody says, durably, that the evaluation is finished
        finally:
            os.close(self._descriptor)

    def add(self, document: DocumentScore, tokens_by_position: np.ndarray, nats_by_position: np.ndarray) -> None:
        """Take in a document; its targets' counts and nats by `position_of` their context, (K,) each."""
        self._documents.append(document)
        for position in np.flatnonzero(tokens_by_position).tolist():
            tokens, nats = self._positions.get(position, (0, 0.0))
            self._positions[position] = (
                tokens + int(tokens_by_position[position]),
                nats + float(nats_by_position[position]),
            )
        if len(self._documents) >= BLOCK_DOCUMENTS or time.monotonic() - self._began >= self._block_seconds:
            self._write()

    def _write(self) -> None:
        if self._documents:
            lines: list[dict[str, Any]] = [asdict(document) for document in self._documents]
            lines.append({"positions": self._positions})
            block = "".join(json.dumps(line) + "\n" for line in lines).encode()
            # At its place whatever an earlier attempt, on a full disk perhaps, left behind it.
            os.truncate(self._descriptor, self._written_bytes)
            view = memoryview(block)
            while view:
                view = view[os.pwrite(self._descriptor, view, self._written_bytes + len(block) - len(view)) :]
            self._written_bytes += len(block)
        self._documents, self._positions, self._began = [], {}, time.monotonic()
