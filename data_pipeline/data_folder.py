"""The files of a prepared data folder that are read while training runs: the tokens of its shards, plans of bins.

Reads by `preadv` rather than through a memory map, where a truncated file is a SIGBUS instead of an error.
"""

import os
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import xxhash

from data_pipeline.config import CacheConfig
from data_pipeline.manifest import Manifest
from data_pipeline.remote import is_local, open_path, shown
from data_pipeline.shards import HASH_BLOCK_BYTES, ShardInfo


class OpenShard(ABC):
    """One shard that can be read at any byte."""

    def __init__(self, path: str, shard: ShardInfo, hashes: np.ndarray) -> None:
        """`path`: of its `.bin`, as errors name it. `hashes`: of its blocks, uint64."""
        self._path = path
        self._shard = shard
        self._hashes = hashes

    @abstractmethod
    def read(self, offset: int, target: memoryview) -> None:
        """Fill the target with the bytes from `offset` on, which are there."""

    @abstractmethod
    def close(self) -> None: ...

    def verify(self, block: int, scratch: np.ndarray) -> None:
        """Check the hash of one block. `scratch`: uint8 `(HASH_BLOCK_BYTES,)`.

        Raises:
            ValueError: it differs.
        """
        if not self._matches(block, scratch):
            raise ValueError(damaged_block(self._path, self._shard, block))

    def _matches(self, block: int, scratch: np.ndarray) -> bool:
        offset = block * HASH_BLOCK_BYTES
        content = scratch.data[: min(HASH_BLOCK_BYTES, self._shard.bin_bytes - offset)]
        self.read(offset, content)
        return xxhash.xxh3_64_intdigest(content) == self._hashes[block]


class DataFolder(ABC):
    """Where the files of a data folder come from."""

    waits = 0
    """How often a read had to wait for a chunk of a shard from elsewhere."""

    @abstractmethod
    def open_shard(self, shard: int) -> OpenShard:
        """Open a shard by its number.

        Raises:
            ValueError: it is missing, or not of its size, or its hashes are damaged.
            OSError: it cannot be had now.
        """

    @abstractmethod
    def read_file(self, name: str, xxh3: str) -> bytes:
        """A whole file. Raises as `open_shard`."""

    @abstractmethod
    def prefetch(self, starts: np.ndarray, counts: np.ndarray) -> None:
        """Runs of tokens that will be read next."""

    @abstractmethod
    def close(self) -> None:
        """Stop what goes on in the background."""


class LocalFolder(DataFolder):
    """A folder that this machine can open."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._shards = manifest.shards

    def open_shard(self, shard: int) -> "OpenShard":
        info = self._shards[shard]
        hashes = np.frombuffer(self.read_file(f"{info.name}.xxh3", info.hashes_xxh3), dtype="<u8")
        return _LocalShard(self._path / f"{info.name}.bin", info, hashes)

    def read_file(self, name: str, xxh3: str) -> bytes:
        path = self._path / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise ValueError(missing_file(str(path))) from None
        if xxhash.xxh3_64_hexdigest(content) != xxh3:
            raise ValueError(damaged_file(str(path)))
        return content

    def prefetch(self, starts: np.ndarray, counts: np.ndarray) -> None:
        """The kernel reads ahead well enough."""

    def close(self) -> None:
        """Nothing goes on in the background."""


class _LocalShard(OpenShard):
    def __init__(self, path: Path, shard: ShardInfo, hashes: np.ndarray) -> None:
        super().__init__(str(path), shard, hashes)
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise ValueError(missing_file(str(path))) from None
        size = os.fstat(self._descriptor).st_size
        if size != shard.bin_bytes:
            os.close(self._descriptor)
            raise ValueError(wrong_size(str(path), size, shard.bin_bytes))

    def read(self, offset: int, target: memoryview) -> None:
        if os.preadv(self._descriptor, [target], offset) == len(target):
            return
        end = read_fully(self._descriptor, offset, target)
        if end < offset + len(target):
            raise ValueError(wrong_size(self._path, end, self._shard.bin_bytes))

    def close(self) -> None:
        os.close(self._descriptor)


def open_folder(path: str, manifest: Manifest, cache: CacheConfig) -> DataFolder:
    """The files of a data folder, through the cache if it lies elsewhere (or the cache is for local folders, too).

    Raises:
        ValueError: it lies elsewhere and the cache has no folder, or too little room.
    """
    local = is_local(path)
    if cache.folder is None:
        if not local:
            raise ValueError(
                f"data folder {shown(path)} is not on this machine: set data.cache.folder to a folder on a local disk"
            )
    elif cache.local_sources or not local:
        from data_pipeline.cached_folder import CachedFolder

        return CachedFolder(path, manifest, cache.folder, cache.max_bytes)
    return LocalFolder(Path(open_path(path)[1] if "://" in path else path), manifest)


def read_fully(descriptor: int, offset: int, target: memoryview) -> int:
    """Fill the target from this byte of a file on; where it stopped, which is early only where the file ends.

    A single read may be short at a signal or a network hiccup.
    """
    while target:
        count = os.preadv(descriptor, [target], offset)
        if not count:
            break
        target, offset = target[count:], offset + count
    return offset


def damaged_block(path: str, shard: ShardInfo, block: int) -> str:
    """What an error says of a block whose hash is not the manifest's."""
    start = block * HASH_BLOCK_BYTES
    end = min(start + HASH_BLOCK_BYTES, shard.bin_bytes)
    return (
        f"shard {path} is damaged in block {block} (bytes {start} to {end}): run `steppe data verify "
        f"{path.rpartition('/')[0]}` to see all damage, then copy it again from where it was whole, or prepare it again"
    )


def damaged_file(path: str) -> str:
    """What an error says of a file whose hash is not the manifest's."""
    folder = path.rpartition("/")[0]
    return f"{path} is damaged: run `steppe data verify {folder}` to see all damage, then prepare the data again"


def missing_file(path: str) -> str:
    """What an error says of a file that the manifest names."""
    return f"{path} is missing: copy it again from where it was whole, or run `steppe data prepare` again"


def wrong_size(path: str, size: int, expected: int) -> str:
    """What an error says of a shard that is shorter or longer than it was."""
    return (
        f"shard file {path} has {size} bytes, but the manifest says {expected} bytes: "
        "copy it again from where it was whole, or run `steppe data prepare` again"
    )
