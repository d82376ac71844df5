"""A data folder that lies elsewhere, through the cache of this machine: its shards come in chunks, verified.

CACHE/STREAM_FINGERPRINT/SHARD.bin/NUMBER    a chunk of CHUNK_BYTES of a shard
CACHE/STREAM_FINGERPRINT/NAME                another file as a whole
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import xxhash

from data_pipeline.data_folder import (
    DataFolder,
    OpenShard,
    damaged_block,
    damaged_file,
    missing_file,
    read_fully,
)
from data_pipeline.manifest import Manifest
from data_pipeline.prefetch import Prefetcher
from data_pipeline.remote import open_path, read_range, read_whole, shown
from data_pipeline.retries import MissingFileError
from data_pipeline.shard_cache import CHUNK_BYTES, ShardCache, release
from data_pipeline.shards import HASH_BLOCK_BYTES, ShardInfo

MOST_HELD_CHUNKS = 32
"""Chunks of a folder held open at once: many sources would meet the limit on open files."""
HELD_FRACTION = 64
"""A reader holds at most this part of the cache, since many share it and what is held cannot make room."""
KEPT_HASHES = 64
"""Shards whose block hashes are kept in memory: 128 KiB for a shard of 1 GiB."""


class CachedFolder(DataFolder):
    """A data folder behind a cache. What it fetches is verified before it gets its name in the cache, once a machine;
    what is read from the cache is verified once a process, as that of a local folder is."""

    def __init__(self, path: str, manifest: Manifest, cache_folder: str, max_bytes: int) -> None:
        """Raises: ValueError: the cache is unusable, or a package is missing that speaks the protocol."""
        self.cache = ShardCache(cache_folder, max_bytes)
        self._tokens = manifest.tokens
        self._itemsize = manifest.numpy_dtype.itemsize
        self._shards = manifest.shards
        self._path = shown(path).rstrip("/")
        self._file_system, self._root = open_path(path)
        self._key = manifest.stream_fingerprint
        # Chunks of all shards are numbered through; those of a shard begin here.
        self._first_chunks = np.cumsum([0] + [-(-shard.bin_bytes // CHUNK_BYTES) for shard in self._shards])
        self._shard_starts = np.cumsum([0] + [shard.bin_bytes for shard in self._shards])
        self._held: OrderedDict[int, int] = OrderedDict()
        self._most_held = min(MOST_HELD_CHUNKS, max(1, max_bytes // CHUNK_BYTES // HELD_FRACTION))
        self._prefetcher = Prefetcher(self._fetch_ahead, ahead=max_bytes // CHUNK_BYTES // 2)
        self._hashes = lru_cache(maxsize=KEPT_HASHES)(self._read_hashes)

    def open_shard(self, shard: int) -> OpenShard:
        return _CachedShard(self, shard, self._shards[shard], self._hashes(shard))

    def read_file(self, name: str, xxh3: str) -> bytes:
        def fetch() -> bytes:
            try:
                content = read_whole(self._file_system, f"{self._root}/{name}")
            except MissingFileError:
                raise ValueError(missing_file(f"{self._path}/{name}")) from None
            if xxhash.xxh3_64_hexdigest(content) != xxh3:
                raise ValueError(damaged_file(f"{self._path}/{name}"))
            return content

        entry = f"{self._key}/{name}"
        for _ in range(2):
            descriptor, _ = self.cache.open(entry, fetch)
            try:
                content = bytearray(os.fstat(descriptor).st_size)
                read_fully(descriptor, 0, memoryview(content))
                if xxhash.xxh3_64_hexdigest(content) == xxh3:
                    return bytes(content)
                self.cache.drop(entry, descriptor)
            finally:
                os.close(descriptor)
        raise OSError(f"{name} is damaged in the cache as soon as it is written: check the disk of data.cache.folder")

    def prefetch(self, starts: np.ndarray, counts: np.ndarray) -> None:
        if not len(starts):
            return
        assert starts.min() >= 0 < counts.min()
        assert (starts + counts).max() <= self._tokens
        itemsize = self._itemsize
        first = self._chunks_of(starts * itemsize)
        spans = self._chunks_of((starts + counts) * itemsize - 1) - first + 1
        within = np.arange(spans.sum()) - np.repeat(np.cumsum(spans) - spans, spans)
        chunks = np.repeat(first, spans) + within
        self._prefetcher.want(chunk for chunk in dict.fromkeys(chunks.tolist()) if chunk not in self._held)

    def close(self) -> None:
        self._prefetcher.close()
        while self._held:
            release(self._held.popitem()[1])

    def read(self, shard: int, offset: int, target: memoryview) -> None:
        """Fill the target with bytes of a shard from the cache, as they are there."""
        first = int(self._first_chunks[shard])
        while target:
            chunk, within = divmod(offset, CHUNK_BYTES)
            count = min(len(target), CHUNK_BYTES - within)
            descriptor = self._held.get(first + chunk)
            if descriptor is None:
                descriptor = self._hold(first + chunk)
            else:
                self._held.move_to_end(first + chunk)
            if read_fully(descriptor, within, target[:count]) < within + count:
                raise OSError(f"the cache of {self._path} was cut short while it was read: start again")
            target, offset = target[count:], offset + count

    def fetch_again(self, shard: int, offset: int) -> None:
        """Replace the chunk with this byte, which is damaged in the cache. Raises as reading does."""
        number = int(self._first_chunks[shard]) + offset // CHUNK_BYTES
        descriptor = self._held.pop(number)
        self.cache.drop(self._entry(number), descriptor)
        os.close(descriptor)
        self._hold(number)

    def path_of(self, shard: int) -> str:
        """A shard's `.bin`, as errors name it."""
        return f"{self._path}/{self._shards[shard].name}.bin"

    def _chunks_of(self, byte: np.ndarray) -> np.ndarray:
        """Numbers of the chunks that hold these bytes of the stream."""
        shard = np.searchsorted(self._shard_starts, byte, side="right") - 1
        return self._first_chunks[shard] + (byte - self._shard_starts[shard]) // CHUNK_BYTES

    def _shard_and_chunk(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first_chunks, number, side="right")) - 1
        return shard, number - int(self._first_chunks[shard])

    def _entry(self, number: int) -> str:
        shard, chunk = self._shard_and_chunk(number)
        return f"{self._key}/{self._shards[shard].name}.bin/{chunk:06d}"

    def _hold(self, number: int) -> int:
        """Open a chunk, for as long as it is among the last used ones."""
        while len(self._held) >= self._most_held:
            release(self._held.popitem(last=False)[1])
        self._prefetcher.taken(number)
        entry = self._entry(number)
        shard, chunk = self._shard_and_chunk(number)
        size = min(CHUNK_BYTES, self._shards[shard].bin_bytes - chunk * CHUNK_BYTES)
        descriptor, waited = self.cache.open(entry, self._fetcher(number))
        if os.fstat(descriptor).st_size != size:  # a power failure may leave this
            self.cache.drop(entry, descriptor)
            os.close(descriptor)
            descriptor, waited = self.cache.open(entry, self._fetcher(number))
        self.waits += waited
        self._held[number] = descriptor
        return descriptor

    def _fetch_ahead(self, number: int) -> None:
        os.close(self.cache.open(self._entry(number), self._fetcher(number))[0])

    def _fetcher(self, number: int) -> Callable[[], bytes]:
        """How to get the content of a chunk, as it was written."""

        def fetch() -> bytes:
            shard, chunk = self._shard_and_chunk(number)
            info, hashes = self._shards[shard], self._hashes(shard)
            start = chunk * CHUNK_BYTES
            end = min(start + CHUNK_BYTES, info.bin_bytes)
            try:
                content = read_range(self._file_system, f"{self._root}/{info.name}.bin", start, end)
            except MissingFileError:
                raise ValueError(missing_file(self.path_of(shard))) from None
            view = memoryview(content)
            for begin in range(0, end - start, HASH_BLOCK_BYTES):
                block = (start + begin) // HASH_BLOCK_BYTES
                if xxhash.xxh3_64_intdigest(view[begin : begin + HASH_BLOCK_BYTES]) != hashes[block]:
                    raise ValueError(damaged_block(self.path_of(shard), info, block))
            return content

        return fetch

    def _read_hashes(self, shard: int) -> np.ndarray:
        info = self._shards[shard]
        return np.frombuffer(self.read_file(f"{info.name}.xxh3", info.hashes_xxh3), dtype="<u8")


class _CachedShard(OpenShard):
    """Holds nothing itself: the folder holds chunks, over all its shards."""

    def __init__(self, folder: CachedFolder, number: int, shard: ShardInfo, hashes: np.ndarray) -> None:
        super().__init__(folder.path_of(number), shard, hashes)
        self._folder = folder
        self._number = number

    def read(self, offset: int, target: memoryview) -> None:
        self._folder.read(self._number, offset, target)

    def verify(self, block: int, scratch: np.ndarray) -> None:
        if not self._matches(block, scratch):
            # Fetched content is verified, so this is damage of the cache, unless it happens again.
            self._folder.fetch_again(self._number, block * HASH_BLOCK_BYTES)
            super().verify(block, scratch)

    def close(self) -> None:
        pass
