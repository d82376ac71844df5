"""A data folder for `steppe bench data --part start` that describes trillions of tokens and takes no room.

All its shards are links to one sparse file, and their block hashes to those of its zeros.
"""

from pathlib import Path

import numpy as np
import xxhash

from data_pipeline.manifest import Manifest
from data_pipeline.shards import DEFAULT_SHARD_BYTES, HASH_BLOCK_BYTES, ShardInfo

VOCAB_SIZE = 32_000
DOCUMENT_TOKENS = 800
"""On average. Indexes and origins of documents are not there, since no start opens one."""


def write_vast(folder: Path, tokens: int) -> Manifest:
    """Write it, with about so many uint16 tokens in shards of the usual size; returns its manifest."""
    folder.mkdir()
    shard_tokens = DEFAULT_SHARD_BYTES // 2
    with open(folder / "zeros.bin", "wb") as zeros:
        zeros.truncate(DEFAULT_SHARD_BYTES)
    block_hash = xxhash.xxh3_64_intdigest(bytes(HASH_BLOCK_BYTES))
    hashes = np.full(DEFAULT_SHARD_BYTES // HASH_BLOCK_BYTES, block_hash, dtype="<u8").tobytes()
    (folder / "zeros.xxh3").write_bytes(hashes)
    shards = []
    for number in range(max(1, round(tokens / shard_tokens))):
        name = f"shard_{number:05d}"
        for suffix in ("bin", "xxh3"):
            (folder / f"{name}.{suffix}").symlink_to(f"zeros.{suffix}")
        documents = shard_tokens // DOCUMENT_TOKENS
        shards.append(
            ShardInfo(
                name=name,
                tokens=shard_tokens,
                documents=documents,
                bin_bytes=DEFAULT_SHARD_BYTES,
                idx_bytes=20 * documents,
                # As long as a real one, and different for each shard.
                idx_xxh3=xxhash.xxh3_64_hexdigest(name.encode()),
                hashes_xxh3=xxhash.xxh3_64_hexdigest(hashes),
                origin_xxh3=xxhash.xxh3_64_hexdigest(name.encode(), seed=1),
            )
        )
    manifest = Manifest(
        vocab_size=VOCAB_SIZE,
        bos_id=1,
        eos_id=2,
        tokenizer_fingerprint="none",
        dtype="uint16",
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=0,
        quarantined=0,
        skipped_files=0,
        shards=tuple(shards),
        origins_xxh3=xxhash.xxh3_64_hexdigest(b""),
    )
    manifest.save(folder)
    return manifest
