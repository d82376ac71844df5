"""index.json: what a checkpoint holds, and which rank's file holds which box of it.

The file is `{"xxh3": HASH, "index": BODY}`, HASH being that of the body's very bytes. It names no path: files are
numbered by rank, so nothing in it can lead out of its folder.
"""

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from pydantic_core import from_json, to_json

from data_pipeline.tokenizer_files import fingerprint_of, tokenizer_in
from model.config import ModelConfig
from pretrain.boxes import Box, Index
from pretrain.config import RunConfig
from pretrain.run_dir import write_durably

INDEX_NAME = "index.json"
STEP_NAME = re.compile(r"step_(\d{8,})")
FORMAT = 2
_HEAD = '{"xxh3": "%s", "index": '
_HEAD_BYTES = len(_HEAD % ("0" * 16))
_STATED_FORMAT = re.compile(rb'\{"format": ?(\d+)')


class DamagedError(ValueError):
    """A checkpoint, or a part of it, is not what was written."""


class OtherVersionError(ValueError):
    """A checkpoint is as it was written, by a version of Steppe with another format."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredFile(_Strict):
    """A rank's file: its size, and the hash of its header and of its blocks' hashes (`rank_file.py`)."""

    size_bytes: int = Field(ge=0)
    xxh3: str = Field(pattern=r"^[0-9a-f]{16}$")


class StoredParameter(_Strict):
    """Where a logical tensor lies: rows of (rank, offset per dimension, size per dimension), one after the other.

    Flat, since a large run has a million boxes.
    """

    shape: tuple[PositiveInt, ...] = Field(min_length=1)
    boxes: list[int]

    @cached_property
    def table(self) -> np.ndarray:
        """int64 `(boxes, 1 + 2 N)`."""
        return np.asarray(self.boxes, dtype=np.int64).reshape(-1, 1 + 2 * len(self.shape))

    @property
    def ranks(self) -> np.ndarray:
        return self.table[:, 0]

    @property
    def offsets(self) -> np.ndarray:
        return self.table[:, 1 : 1 + len(self.shape)]

    @property
    def sizes(self) -> np.ndarray:
        return self.table[:, 1 + len(self.shape) :]

    def box(self, row: int) -> Box:
        """The box of a row."""
        return Box(tuple(self.offsets[row].tolist()), tuple(self.sizes[row].tolist()))


class CheckpointIndex(_Strict):
    """All of a checkpoint but its tensors.

    step                   optimizer steps made
    model                  the architecture that the tensors are of
    sequence_length        tokens it was trained to see at once
    tokenizer_fingerprint  of the tokenizer beside it; None where there is none
    trainer, engine        `TrainState.state_dict()` and `Engine.scalars()`; None for imported weights, with `config`
    config                 the run that saved it
    block_bytes            size of a block that is hashed by itself
    files                  by rank
    parameters             by logical name
    """

    format: Literal[2] = 2
    step: int = Field(ge=0)
    model: ModelConfig
    sequence_length: int = Field(gt=0)
    tokenizer_fingerprint: str | None = None
    trainer: dict[str, Any] | None = None
    engine: dict[str, Any] | None = None
    config: RunConfig | None = None
    block_bytes: int = Field(gt=0)
    files: list[StoredFile]
    parameters: dict[str, StoredParameter]

    @model_validator(mode="after")
    def _boxes_are_within(self) -> Self:
        for name, stored in self.parameters.items():
            if len(stored.boxes) % (1 + 2 * len(stored.shape)):
                raise ValueError(f"{name}: {len(stored.boxes)} numbers are no list of boxes of shape {stored.shape}")
            try:
                shape = np.asarray(stored.shape, dtype=np.int64)
                inside = (stored.offsets >= 0) & (stored.sizes > 0) & (stored.offsets <= shape - stored.sizes)
            except OverflowError:
                raise ValueError(f"{name}: a number in its shape or boxes is larger than any tensor") from None
            known = (stored.ranks >= 0) & (stored.ranks < len(self.files))
            if not (inside.all() and known.all()):
                raise ValueError(f"{name}: a box lies outside of its shape {stored.shape}, or in a file that is none")
        return self

    @property
    def size_bytes(self) -> int:
        """Of all ranks' files."""
        return sum(file.size_bytes for file in self.files)


def rank_file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def packed_boxes(rank: int, held: Iterable[tuple[str, Index, Box]]) -> bytes:
    """The boxes (name, shape, box) that a rank holds, as `stored_parameters` takes them.

    Packed, since those of a thousand ranks would be millions of objects at once, which Python's garbage collector goes
    through again and again.
    """
    boxes: dict[str, tuple[Index, list[int]]] = {}
    for name, shape, box in held:
        boxes.setdefault(name, (shape, []))[1].extend((rank, *box.offset, *box.size))
    return to_json(boxes)


def stored_parameters(of_ranks: Iterable[bytes]) -> dict[str, StoredParameter]:
    """All ranks' boxes together."""
    everything: dict[str, tuple[Index, list[int]]] = {}
    for packed in of_ranks:
        for name, (shape, rows) in from_json(packed).items():
            everything.setdefault(name, (tuple(shape), []))[1].extend(rows)
    return {name: StoredParameter(shape=shape, boxes=rows) for name, (shape, rows) in everything.items()}


def write_index(folder: Path, index: CheckpointIndex) -> None:
    """Write index.json durably."""
    body = index.model_dump_json()
    write_durably(folder / INDEX_NAME, _HEAD % xxhash.xxh3_64_hexdigest(body.encode()) + body + "}")


def parse_index(raw: bytes, path: Path) -> CheckpointIndex:
    """The index in the bytes of an index.json. Raises DamagedError or OtherVersionError, naming `path`."""
    if not raw.startswith(_HEAD.partition("%s")[0].encode()):
        raise DamagedError(f"{path} is damaged, or of another version of Steppe: it does not begin with a hash")
    body = raw[_HEAD_BYTES:-1]
    if raw != (_HEAD % xxhash.xxh3_64_hexdigest(body)).encode() + body + b"}":
        raise DamagedError(f"{path} is damaged: it does not match the hash in it")
    stated = _STATED_FORMAT.match(body)
    if stated is not None and int(stated[1]) != FORMAT:
        raise OtherVersionError(
            f"{path} has checkpoint format {int(stated[1])}, this version of Steppe reads {FORMAT}: use the version "
            "that wrote it"
        )
    try:
        return CheckpointIndex.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DamagedError(f"{path} is no index of a checkpoint: {where or 'it'}: {first['msg']}") from None


def read_index(checkpoint: Path) -> CheckpointIndex:
    """Read and check index.json, and that every file it counts is there with its size.

    Raises DamagedError if anything is missing, or not what was written; OtherVersionError.
    """
    return checked_index(checkpoint)[0]


def checked_index(checkpoint: Path) -> tuple[CheckpointIndex, bytes]:
    """As `read_index`; and the bytes that it was parsed from."""
    path = checkpoint / INDEX_NAME
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    index = parse_index(raw, path)
    named = STEP_NAME.fullmatch(checkpoint.name)
    if named is not None and index.config is not None and int(named[1]) != index.step:
        raise DamagedError(f"{path} is of step {index.step}, not of that in its folder's name")
    for rank, stored in enumerate(index.files):
        check_size(checkpoint / rank_file_name(rank), stored.size_bytes)
    expected = index.tokenizer_fingerprint
    tokenizer = tokenizer_in(checkpoint)
    if expected is not None and fingerprint_of(tokenizer) != expected:
        raise DamagedError(f"{tokenizer} is missing, or not the one that was saved ({expected})")
    return index, raw


def check_size(path: Path, expected: int) -> None:
    """Raise DamagedError unless the file is there, and as long as it was written."""
    actual = path.stat().st_size if path.is_file() else None
    if actual != expected:
        found = "is missing" if actual is None else f"has {actual} bytes"
        raise DamagedError(f"{path} {found}, expected {expected} bytes")
