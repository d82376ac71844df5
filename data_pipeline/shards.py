"""Token shards on disk: Megatron-LM's `.bin/.idx` pair, and hashes of every block of it.

NAME.bin    the token ids of all documents, one after another
NAME.idx    the lengths and offsets of the documents, as Megatron's `IndexedDataset` reads them (MMIDIDX version 1)
NAME.xxh3   xxh3-64 of each 64 KiB of NAME.bin, little-endian uint64: raw, since 20 TB have 300 million of them
NAME.origin where each document came from (data_pipeline/origins.py); not in folders that were written without
"""

import contextlib
import os
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from data_pipeline.origins import ORIGIN_DTYPE

HASH_BLOCK_BYTES = 64 * 1024
DEFAULT_SHARD_BYTES = 1 << 30
WRITE_BYTES = 4 << 20
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
INDEX_HEADER = struct.Struct("<9sQBQQ")
MAX_DOCUMENT_TOKENS = (1 << 31) - 1
"""An index keeps lengths as int32."""
DTYPE_CODES = {"uint16": 8, "int32": 4}
"""Megatron's codes of the two types in use."""


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest keeps of a shard."""

    name: str
    tokens: int
    documents: int
    bin_bytes: int
    idx_bytes: int
    idx_xxh3: str
    hashes_xxh3: str
    """xxh3-64 of the file of block hashes."""
    origin_xxh3: str | None = None
    """xxh3-64 of the file of origins; None if there is none."""

    @property
    def blocks(self) -> int:
        """Number of hash blocks; the last may be short."""
        return -(-self.bin_bytes // HASH_BLOCK_BYTES)

    def file_sizes(self) -> dict[str, int]:
        """Size in bytes of each file of the shard, by file name."""
        sizes = {
            f"{self.name}.bin": self.bin_bytes,
            f"{self.name}.idx": self.idx_bytes,
            f"{self.name}.xxh3": 8 * self.blocks,
        }
        if self.origin_xxh3 is not None:
            sizes[f"{self.name}.origin"] = ORIGIN_DTYPE.itemsize * self.documents
        return sizes


def fault_of(folder: Path, shard: ShardInfo) -> str | None:
    """Which file of a shard is not there in full, in words; None if all are. Looks at sizes only."""
    for name, expected in shard.file_sizes().items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected:
            return f"{path} is missing" if size is None else f"{path} has {size:,} bytes instead of {expected:,}"
    return None


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrower of Megatron's types that holds every id: uint16 or int32, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


class ShardWriter:
    """Streams documents into shards of about `shard_bytes`; a document is never split.

    Every file is written under a temporary name, fsynced and renamed. `close` finishes the last shard; leaving the
    context by an exception discards it.
    """

    def __init__(self, folder: Path, dtype: np.dtype, shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        assert shard_bytes > 0
        self.shards: list[ShardInfo] = []
        self._folder = folder
        self._dtype = dtype
        self._shard_bytes = shard_bytes
        self._open: _OpenShard | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *rest: object) -> None:
        if error_type is None:
            self.close()
        elif self._open is not None:
            self._open.discard()

    def append(self, tokens: np.ndarray, lengths: np.ndarray, origins: np.ndarray | None = None) -> None:
        """Add documents: their tokens in one array `(sum(lengths),)`, and the number of tokens of each.

        origins: where each came from, `(documents,)` of ORIGIN_DTYPE; given for all documents of a shard or for none.

        Raises:
            ValueError: a document is too long for the format.
            OSError: the disk is full or the like.
        """
        if len(lengths) and lengths.max() > MAX_DOCUMENT_TOKENS:
            raise ValueError(
                f"a document has {lengths.max():,} tokens, but the shards hold documents of at most "
                f"{MAX_DOCUMENT_TOKENS:,}: split it, or set curation.length.max_characters"
            )
        assert tokens.dtype == self._dtype
        assert origins is None or (origins.dtype == ORIGIN_DTYPE and len(origins) == len(lengths))
        ends = np.cumsum(lengths)
        assert (ends[-1] if len(ends) else 0) == len(tokens)
        document = start = 0
        while document < len(lengths):
            if self._open is None:
                self._open = _OpenShard(self._folder, f"shard_{len(self.shards):05d}", self._dtype)
            room = self._shard_bytes // self._dtype.itemsize - self._open.tokens
            fitting = int(np.searchsorted(ends, start + room, side="right"))
            # A document longer than a shard gets one to itself.
            fitting = max(fitting, document + (self._open.tokens == 0))
            if fitting > document:
                end = int(ends[fitting - 1])
                self._open.append(
                    tokens[start:end], lengths[document:fitting], None if origins is None else origins[document:fitting]
                )
                document, start = fitting, end
            if document < len(lengths):
                self.close()

    def close(self) -> None:
        """Finish the shard that is being written."""
        if self._open is not None:
            self.shards.append(self._open.finish())
            self._open = None


class _OpenShard:
    def __init__(self, folder: Path, name: str, dtype: np.dtype) -> None:
        self.tokens = 0
        self._folder = folder
        self._name = name
        self._dtype = dtype
        self._lengths = array("i")
        self._origins = bytearray()
        self._hashes = array("Q")
        self._pending = bytearray()
        self._bin = AtomicFile(folder / f"{name}.bin")

    def append(self, tokens: np.ndarray, lengths: np.ndarray, origins: np.ndarray | None) -> None:
        self.tokens += len(tokens)
        self._origins += b"" if origins is None else origins.tobytes()
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self._pending += tokens.data.cast("B") if len(tokens) else b""
        if len(self._pending) >= WRITE_BYTES:
            self._write(len(self._pending) // HASH_BLOCK_BYTES * HASH_BLOCK_BYTES)

    def _write(self, count: int) -> None:
        with memoryview(self._pending) as pending, pending[:count] as ready:
            self._hashes.extend(
                xxhash.xxh3_64_intdigest(ready[start : start + HASH_BLOCK_BYTES])
                for start in range(0, count, HASH_BLOCK_BYTES)
            )
            self._bin.write(ready)
        del self._pending[:count]

    def finish(self) -> ShardInfo:
        self._write(len(self._pending))
        self._bin.commit()
        index = self._index()
        hashes = np.array(self._hashes, dtype="<u8").tobytes()
        write_atomically(self._folder / f"{self._name}.idx", index)
        write_atomically(self._folder / f"{self._name}.xxh3", hashes)
        if self._origins:
            assert len(self._origins) == ORIGIN_DTYPE.itemsize * len(self._lengths)
            write_atomically(self._folder / f"{self._name}.origin", self._origins)
        return ShardInfo(
            name=self._name,
            tokens=self.tokens,
            documents=len(self._lengths),
            bin_bytes=self.tokens * self._dtype.itemsize,
            idx_bytes=len(index),
            idx_xxh3=xxhash.xxh3_64_hexdigest(index),
            hashes_xxh3=xxhash.xxh3_64_hexdigest(hashes),
            origin_xxh3=xxhash.xxh3_64_hexdigest(self._origins) if self._origins else None,
        )

    def discard(self) -> None:
        self._bin.discard()

    def _index(self) -> bytes:
        """One document is one sequence, as Megatron's `preprocess_data.py` writes without sentence splitting."""
        lengths = np.array(self._lengths, dtype="<i4")
        count = len(lengths)
        offsets = np.zeros(count, dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        offsets *= self._dtype.itemsize
        documents = np.arange(count + 1, dtype="<i8")
        code = DTYPE_CODES[self._dtype.name]
        header = INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, code, count, len(documents))
        return header + lengths.tobytes() + offsets.tobytes() + documents.tobytes()


class AtomicFile:
    """A file that has its name only once it is complete and on the disk."""

    def __init__(self, path: Path, mode: int = 0o666) -> None:
        """mode: its permissions, of which the process's umask takes some away."""
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        self._file: BinaryIO = open(descriptor, "wb", buffering=0)  # noqa: SIM115

    def write(self, content: bytes | bytearray | memoryview) -> None:
        view = memoryview(content)
        while view:
            view = view[self._file.write(view) :]

    def commit(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        sync_folder(self._path.parent)

    def discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | bytearray, mode: int = 0o666) -> None:
    """Write a whole file so that under its name it is there complete or not at all; `mode` as `AtomicFile` has it.

    Raises:
        OSError: the disk is full or the like; nothing is left behind.
    """
    file = AtomicFile(path, mode)
    try:
        file.write(content)
        file.commit()
    except BaseException:
        file.discard()
        raise


def sync_folder(folder: Path) -> None:
    """Bring a rename to the disk. Some network filesystems cannot, and need not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Lengths in tokens and offsets in bytes of the documents of an `.idx` file.

    Raises:
        ValueError: the file is not such an index, or is damaged.
    """
    return parse_index(path.read_bytes(), str(path))


def parse_index(content: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """As `read_index`, of a file that has been read already; errors call it `name`."""
    try:
        magic, version, _, sequences, documents = INDEX_HEADER.unpack_from(content)
    except struct.error:
        magic, version, sequences, documents = b"", 0, 0, 0
    expected_bytes = INDEX_HEADER.size + 12 * sequences + 8 * documents
    if magic != INDEX_MAGIC or version != INDEX_VERSION or len(content) != expected_bytes:
        raise ValueError(f"{name} is not a Megatron index (MMIDIDX version {INDEX_VERSION}) or is damaged")
    lengths = np.frombuffer(content, dtype="<i4", count=sequences, offset=INDEX_HEADER.size)
    offsets = np.frombuffer(content, dtype="<i8", count=sequences, offset=INDEX_HEADER.size + 4 * sequences)
    return lengths, offsets
