"""Batches to score a model by: a held-out source from its beginning, the same for every run."""

from collections.abc import Iterator

import numpy as np

from data_pipeline.batch import Batch, join_extents
from data_pipeline.config import CacheConfig, SourceConfig
from data_pipeline.manifest import Manifest
from data_pipeline.token_source import TokenSource


def validation_batches(
    source: SourceConfig,
    sequence_length: int,
    micro_batch_size: int,
    data_rank: int,
    data_world: int,
    document_mask: bool,
    limit_windows: int | None = None,
    manifest: Manifest | None = None,
    cache: CacheConfig | None = None,
) -> Iterator[Batch]:
    """A held-out source from its beginning, in order: every token but the first is a target exactly once.

    Windows, however the training data is packed, so that losses can be compared. Every rank gets the same number of
    batches, so that they may meet after each: the last windows may be short or empty, padded by targets of -100.
    `limit_windows` ends it early, over all ranks. `cache`: where a source that lies elsewhere is kept meanwhile.

    Raises:
        ValueError: the source is unusable or damaged.
        OSError: it cannot be read now.
    """
    opened = TokenSource(source.path, manifest, cache)
    try:
        inputs = max(0, opened.tokens - 1)
        if limit_windows is not None:
            inputs = min(inputs, limit_windows * sequence_length)
        per_step = micro_batch_size * data_world
        windows = -(-inputs // sequence_length)
        for first in range(data_rank * micro_batch_size, -(-windows // per_step) * per_step, per_step):
            start = np.minimum((first + np.arange(micro_batch_size)) * sequence_length, inputs)
            count = np.minimum(sequence_length, inputs - start)
            row = np.concatenate([[0], np.cumsum(count > 0)])
            start, count = start[count > 0], count[count > 0]
            place = np.concatenate([[0], np.cumsum(count + 1)])
            tokens = np.empty(place[-1], dtype=opened.dtype)
            opened.read(start, count + 1, tokens, place[:-1])
            bos_id, eos_id = opened.manifest.bos_id, opened.manifest.eos_id
            yield join_extents(tokens, count, row, sequence_length, bos_id, eos_id, document_mask, False)
    finally:
        opened.close()
