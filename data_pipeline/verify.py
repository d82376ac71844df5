"""Is a data folder still what was written? Reads every byte of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data_pipeline.manifest import Manifest
from data_pipeline.origins import ORIGINS_NAME
from data_pipeline.remote import identity, open_path, read_range, read_whole, shown
from data_pipeline.retries import MissingFileError
from data_pipeline.shards import HASH_BLOCK_BYTES, ShardInfo
from data_pipeline.tokenizer_files import fingerprint_of

READ_BLOCKS = 64
NAMED_DAMAGES = 4


@dataclass(frozen=True)
class VerifyReport:
    """What was found whole."""

    shards: int
    blocks: int
    bin_bytes: int
    documents: int
    tokens: int
    manifest_fingerprint: str


def verify(folder: str | Path, progress: Callable[[int, int], None] = lambda done, total: None) -> VerifyReport:
    """Check every file of a data folder, here or in an object store. `progress` is told bytes done and in all.

    Raises:
        ValueError: a file is missing or has another size, or content differs; names the shards and blocks.
        OSError: a file cannot be read now.
    """
    manifest = Manifest.load(folder)
    files = _Files(str(folder))
    total_bytes = sum(shard.bin_bytes for shard in manifest.shards)
    done_bytes = 0

    def advance(count: int) -> None:
        nonlocal done_bytes
        done_bytes += count
        progress(done_bytes, total_bytes)

    damages = []
    if fingerprint_of(f"{folder}/{manifest.tokenizer_file}") != manifest.tokenizer_fingerprint:
        damages.append(f"{manifest.tokenizer_file} is not the tokenizer that the manifest names")
    if manifest.origins_xxh3 is not None:
        damages += files.damages_of(ORIGINS_NAME, manifest.origins_xxh3)
    for shard in manifest.shards:
        damages += _damages_of_shard(files, shard, advance)
    for pack in manifest.packs:
        damages += files.damages_of(pack.blocks_name, pack.blocks_xxh3)
        for shard, xxh3 in zip(manifest.shards, pack.shard_xxh3, strict=True):
            damages += files.damages_of(pack.name_of(shard), xxh3)
    if damages:
        named = "; ".join(damages[:NAMED_DAMAGES])
        more = f"; and {len(damages) - NAMED_DAMAGES} more" if len(damages) > NAMED_DAMAGES else ""
        raise ValueError(
            f"data folder {shown(str(folder))} is damaged: {named}{more}: copy it again or run `steppe data prepare`"
        )
    return VerifyReport(
        shards=len(manifest.shards),
        blocks=sum(shard.blocks for shard in manifest.shards),
        bin_bytes=total_bytes,
        documents=manifest.documents,
        tokens=manifest.tokens,
        manifest_fingerprint=manifest.fingerprint,
    )


class _Files:
    """The files of a folder by name; each check says in words what is wrong."""

    def __init__(self, folder: str) -> None:
        self._file_system, self._root = open_path(folder)

    def read(self, name: str) -> bytes | None:
        try:
            return read_whole(self._file_system, f"{self._root}/{name}")
        except MissingFileError:
            return None

    def read_range(self, name: str, start: int, end: int) -> bytes:
        return read_range(self._file_system, f"{self._root}/{name}", start, end)

    def damages_of(self, name: str, xxh3: str) -> list[str]:
        return _damages_of(name, self.read(name), xxh3)

    def wrong_size(self, name: str, expected: int) -> list[str]:
        try:
            size = identity(self._file_system, f"{self._root}/{name}").size
        except MissingFileError:
            return [f"{name} is missing"]
        return [] if size in (expected, None) else [f"{name} has {size} bytes, but the manifest says {expected} bytes"]


def _damages_of(name: str, content: bytes | None, xxh3: str) -> list[str]:
    if content is None:
        return [f"{name} is missing"]
    return [] if xxhash.xxh3_64_hexdigest(content) == xxh3 else [f"{name} does not match its hash"]


def _damages_of_shard(files: _Files, shard: ShardInfo, advance: Callable[[int], None]) -> list[str]:
    damages = files.damages_of(f"{shard.name}.idx", shard.idx_xxh3)
    if shard.origin_xxh3 is not None:
        damages += files.damages_of(f"{shard.name}.origin", shard.origin_xxh3)
    hashes = files.read(f"{shard.name}.xxh3")
    hopeless = _damages_of(f"{shard.name}.xxh3", hashes, shard.hashes_xxh3)
    hopeless += files.wrong_size(f"{shard.name}.bin", shard.bin_bytes)
    if hashes is None or hopeless:
        # Without its hashes, nothing can be said of the blocks, nor of those of a file that is cut short.
        return damages + hopeless
    for first in range(0, shard.bin_bytes, READ_BLOCKS * HASH_BLOCK_BYTES):
        end = min(first + READ_BLOCKS * HASH_BLOCK_BYTES, shard.bin_bytes)
        content = memoryview(files.read_range(f"{shard.name}.bin", first, end))
        for start in range(first, end, HASH_BLOCK_BYTES):
            block = start // HASH_BLOCK_BYTES
            actual = xxhash.xxh3_64_intdigest(content[start - first : start - first + HASH_BLOCK_BYTES])
            if actual != int.from_bytes(hashes[8 * block : 8 * block + 8], "little"):
                damages.append(f"shard {shard.name}.bin, block {block} (from byte {start})")
        advance(end - first)
    return damages
