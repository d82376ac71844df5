"""The manifest of a data folder: what was written, by which tokenizer, and how to tell that it is all there.

A data folder is self-contained: shards, `tokenizer.model`, `quarantine.jsonl` and, written last, `manifest.json`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.shards import ShardInfo, write_atomically

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.model"
QUARANTINE_NAME = "quarantine.jsonl"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """Everything that must hold of a data folder."""

    vocab_size: int
    bos_id: int | None
    eos_id: int
    tokenizer_fingerprint: str
    """xxh3-64 of `tokenizer.model`, in hexadecimal."""
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
    format_version: int = FORMAT_VERSION

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def fingerprint(self) -> str:
        """xxh3-64 of the manifest, in hexadecimal: it covers the hash of every block of every shard."""
        return xxhash.xxh3_64_hexdigest(self._serialized())

    def _serialized(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    def save(self, folder: Path) -> None:
        """Write `manifest.json`, which declares the folder complete."""
        write_atomically(folder / MANIFEST_NAME, self._serialized())

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Read the manifest of a data folder and check that every file is there in full.

        Raises:
            ValueError: the folder is not a (finished) data folder, or a file of it is missing or has another size.
        """
        folder = Path(folder)
        path = folder / MANIFEST_NAME
        if not path.is_file():
            state = "is unfinished or no data folder (it has no manifest.json)" if folder.is_dir() else "does not exist"
            raise ValueError(f"data folder {folder} {state}: make it with `steppe data prepare`")
        manifest = cls._parse(path)
        for shard in manifest.shards:
            for name, expected in shard.file_sizes().items():
                _check_size(folder / name, expected)
        if not (folder / TOKENIZER_NAME).is_file():
            raise ValueError(f"{folder / TOKENIZER_NAME} is missing: copy it back or run `steppe data prepare` again")
        return manifest

    @classmethod
    def _parse(cls, path: Path) -> "Manifest":
        try:
            fields: dict[str, Any] = json.loads(path.read_bytes())
            version = fields["format_version"]
            if version == FORMAT_VERSION:
                return cls(**(fields | {"shards": tuple(ShardInfo(**shard) for shard in fields["shards"])}))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): run `steppe data prepare` again") from error
        raise ValueError(
            f"{path} has format version {version}, but this Steppe reads {FORMAT_VERSION}: prepare it again"
        )


def _check_size(path: Path, expected: int) -> None:
    actual = path.stat().st_size if path.is_file() else None
    if actual != expected:
        found = "is missing" if actual is None else f"has {actual} bytes"
        raise ValueError(
            f"shard file {path} {found}, but the manifest says {expected} bytes: "
            "copy it again from where it was whole, or run `steppe data prepare` again"
        )
