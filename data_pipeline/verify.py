"""Is a data folder still what was written? Reads every byte of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data_pipeline.manifest import TOKENIZER_NAME, Manifest
from data_pipeline.shards import HASH_BLOCK_BYTES, ShardInfo

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
    """Check every block of every shard, the indices and the tokenizer. `progress` is told bytes done and in all.

    Raises:
        ValueError: a file is missing or has another size, or content differs; names the shards and blocks.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    total_bytes = sum(shard.bin_bytes for shard in manifest.shards)
    done_bytes = 0

    def advance(count: int) -> None:
        nonlocal done_bytes
        done_bytes += count
        progress(done_bytes, total_bytes)

    damages = []
    if _hash_file(folder / TOKENIZER_NAME) != manifest.tokenizer_fingerprint:
        damages.append(f"{TOKENIZER_NAME} is not the tokenizer that the manifest names")
    for shard in manifest.shards:
        damages += _damages_of_shard(folder, shard, advance)
    if damages:
        named = "; ".join(damages[:NAMED_DAMAGES])
        more = f"; and {len(damages) - NAMED_DAMAGES} more" if len(damages) > NAMED_DAMAGES else ""
        raise ValueError(f"data folder {folder} is damaged: {named}{more}: copy it again or run `steppe data prepare`")
    return VerifyReport(
        shards=len(manifest.shards),
        blocks=sum(shard.blocks for shard in manifest.shards),
        bin_bytes=total_bytes,
        documents=manifest.documents,
        tokens=manifest.tokens,
        manifest_fingerprint=manifest.fingerprint,
    )


def _hash_file(path: Path) -> str:
    return xxhash.xxh3_64_hexdigest(path.read_bytes())


def _damages_of_shard(folder: Path, shard: ShardInfo, advance: Callable[[int], None]) -> list[str]:
    damages = []
    if _hash_file(folder / f"{shard.name}.idx") != shard.idx_xxh3:
        damages.append(f"{shard.name}.idx does not match its hash")
    hashes_path = folder / f"{shard.name}.xxh3"
    if _hash_file(hashes_path) != shard.hashes_xxh3:
        # Without its hashes, nothing can be said of the blocks.
        return [*damages, f"{shard.name}.xxh3 does not match its hash"]
    hashes = memoryview(hashes_path.read_bytes())
    with (folder / f"{shard.name}.bin").open("rb", buffering=0) as file:
        for first in range(0, shard.blocks, READ_BLOCKS):
            content = memoryview(file.read(READ_BLOCKS * HASH_BLOCK_BYTES))
            for block in range(first, min(first + READ_BLOCKS, shard.blocks)):
                start = (block - first) * HASH_BLOCK_BYTES
                actual = xxhash.xxh3_64_intdigest(content[start : start + HASH_BLOCK_BYTES])
                if actual != int.from_bytes(hashes[8 * block : 8 * block + 8], "little"):
                    damages.append(f"shard {shard.name}.bin, block {block} (from byte {block * HASH_BLOCK_BYTES})")
            advance(len(content))
    return damages
