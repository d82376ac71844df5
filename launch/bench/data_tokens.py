"""Tokens for `steppe bench data --part loader`: a data folder of random documents, as long as those of the web."""

from pathlib import Path

import numpy as np

from data_pipeline.manifest import Manifest
from data_pipeline.pack_files import plan_packing
from data_pipeline.shards import ShardWriter, token_dtype

VOCAB_SIZE = 32_000
BOS_ID, EOS_ID = 1, 2
MEDIAN_TOKENS, SPREAD = 400, 1.2
"""Lengths of documents are log-normal: their mean is about twice the median."""
DOCUMENTS_AT_ONCE = 4096


def write_tokens(folder: Path, tokens: int, sequence_length: int) -> Manifest:
    """Write a data folder of one shard with about so many tokens, packed for a sequence length, too."""
    folder.mkdir()
    random = np.random.default_rng(0)
    dtype = token_dtype(VOCAB_SIZE)
    written = documents = 0
    with ShardWriter(folder, dtype, shard_bytes=2 * dtype.itemsize * tokens) as writer:
        while written < tokens:
            lengths = random.lognormal(np.log(MEDIAN_TOKENS), SPREAD, DOCUMENTS_AT_ONCE).astype(np.int64) + 2
            lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens - written)) + 1]
            ends = np.cumsum(lengths)
            ids = random.integers(EOS_ID + 1, VOCAB_SIZE, ends[-1], dtype=dtype.type)
            ids[ends - lengths], ids[ends - 1] = BOS_ID, EOS_ID
            writer.append(ids, lengths)
            written, documents = written + len(ids), documents + len(lengths)
    Manifest(
        vocab_size=VOCAB_SIZE,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        tokenizer_fingerprint="random",
        dtype=dtype.name,
        documents=documents,
        tokens=written,
        text_bytes=0,
        quarantined=0,
        skipped_files=0,
        shards=tuple(writer.shards),
    ).save(folder)
    plan_packing(folder, sequence_length)
    return Manifest.load(folder)
