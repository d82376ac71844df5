"""The manifest of a data folder: what was written, by which tokenizer, and how to tell that it is all there.

A data folder is self-contained: shards, the tokenizer, `quarantine.jsonl` and, written last, `manifest.json`.
"""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.remote import is_local, open_path, read_whole, shown
from data_pipeline.retries import MissingFileError
from data_pipeline.shards import ShardInfo, write_atomically
from data_pipeline.tokenizer_files import SENTENCEPIECE_NAME

MANIFEST_NAME = "manifest.json"
QUARANTINE_NAME = "quarantine.jsonl"
FORMAT_VERSIONS = (1, 2)
"""2 adds packs, origins and other tokenizers. A folder that has none of them is written as version 1 is, so that it
keeps its fingerprint, and older readers."""


@dataclass(frozen=True)
class PackInfo:
    """A plan of bins for one sequence length: the files `pack{T}.blocks` and, for each shard, `NAME.pack{T}`."""

    sequence_length: int
    """T: tokens of a bin."""
    block_tokens: int
    """Tokens of a shuffle block; documents are packed with those that begin in the same one."""
    samples: int
    """Bins."""
    tokens: int
    """That the bins hold, padding left out."""
    padding_tokens: int
    cut_documents: int
    """Documents longer than T."""
    blocks_xxh3: str
    """xxh3-64 of `pack{T}.blocks`, in hexadecimal."""
    shard_xxh3: tuple[str, ...]
    """xxh3-64 of each shard's `NAME.pack{T}`."""

    @property
    def fingerprint(self) -> str:
        """xxh3-64 of all that, in hexadecimal."""
        return xxhash.xxh3_64_hexdigest(json.dumps(asdict(self)).encode())

    @property
    def blocks_name(self) -> str:
        """Name of the file of all shards together."""
        return f"pack{self.sequence_length}.blocks"

    def name_of(self, shard: ShardInfo) -> str:
        """Name of the file of one shard."""
        return f"{shard.name}.pack{self.sequence_length}"


@dataclass(frozen=True)
class Manifest:
    """Everything that must hold of a data folder."""

    vocab_size: int
    bos_id: int | None
    eos_id: int
    tokenizer_fingerprint: str
    """xxh3-64 of the tokenizer, in hexadecimal."""
    dtype: str
    """uint16 or int32, little-endian."""
    documents: int
    tokens: int
    """With each document's BOS and EOS."""
    text_bytes: int
    """UTF-8 bytes of the documents."""
    quarantined: int
    """Broken records, kept in `quarantine.jsonl`."""
    skipped_files: int
    """Binary and hidden files that were passed over."""
    shards: tuple[ShardInfo, ...]
    packs: tuple[PackInfo, ...] = ()
    """By ascending sequence length."""
    tokenizer_file: str = SENTENCEPIECE_NAME
    """The tokenizer's file in the folder."""
    origins_xxh3: str | None = None
    """xxh3-64 of `origins.json`, in hexadecimal; None if the folder does not say where its documents came from."""

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")

    @cached_property
    def fingerprint(self) -> str:
        """xxh3-64 of the manifest, in hexadecimal: it covers the hash of every block of every shard."""
        return xxhash.xxh3_64_hexdigest(self._serialized())

    @cached_property
    def stream_fingerprint(self) -> str:
        """xxh3-64 of what the manifest says of the tokens, in hexadecimal; packing them does not change it."""
        stream = [(shard.name, shard.bin_bytes, shard.hashes_xxh3) for shard in self.shards]
        return xxhash.xxh3_64_hexdigest(json.dumps([self.dtype, stream]).encode())

    def _serialized(self) -> bytes:
        # A field without a default has MISSING for one, which nothing equals.
        said = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}
        newer = any(field.name in said for field in fields(self) if field.default is not MISSING)
        for name in said.keys() & {"shards", "packs"}:
            said[name] = [_without_none(info) for info in said[name]]
        said["format_version"] = FORMAT_VERSIONS[newer]
        return (json.dumps(said, indent=1) + "\n").encode()

    def save(self, folder: Path) -> None:
        """Write `manifest.json`, which declares the folder complete."""
        write_atomically(folder / MANIFEST_NAME, self._serialized())

    @classmethod
    def load(cls, path: str | Path) -> "Manifest":
        """Read the manifest of a data folder, here or in an object store, and nothing else of it.

        Whether a file is there in full is seen when it is first opened, since thousands of ranks that look at
        thousands of shards stall a shared file system; `verify` looks at all.

        Raises:
            ValueError: this is no (finished) data folder, or the manifest is damaged.
            OSError: it cannot be read now.
        """
        name = shown(str(path)).rstrip("/")
        try:
            file_system, root = open_path(path)
            content = read_whole(file_system, f"{root}/{MANIFEST_NAME}")
        except MissingFileError:
            absent = is_local(str(path)) and not Path(root).is_dir()
            state = "does not exist" if absent else "is unfinished or no data folder (it has no manifest.json)"
            raise ValueError(f"data folder {name} {state}: make it with `steppe data prepare`") from None
        return cls._parse(f"{name}/{MANIFEST_NAME}", content)

    @classmethod
    def _parse(cls, name: str, content: bytes) -> "Manifest":
        try:
            said: dict[str, Any] = json.loads(content)
            version = said.pop("format_version")
            if version in FORMAT_VERSIONS:
                shards = tuple(ShardInfo(**shard) for shard in said.pop("shards"))
                packs = tuple(
                    PackInfo(**pack | {"shard_xxh3": tuple(pack["shard_xxh3"])}) for pack in said.pop("packs", ())
                )
                return cls(**said, shards=shards, packs=packs)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{name} is damaged ({error}): run `steppe data prepare` again") from error
        raise ValueError(
            f"{name} has format version {version}, but this Steppe reads up to {FORMAT_VERSIONS[-1]}: prepare it again"
        )


def _without_none(info: ShardInfo | PackInfo) -> dict[str, Any]:
    return {name: value for name, value in vars(info).items() if value is not None}
