"""Batches where none can or need be read: to measure with, and to rehearse with."""

import numpy as np

from data_pipeline.batch import Batch, make_batch
from pretrain.config import RunConfig


def random_batch(config: RunConfig, number: int) -> Batch:
    """A micro-batch of random tokens, a function of the run's seed and its number, in two documents a sequence.

    Without a document mask each target counts.
    """
    B, T = config.batch.micro_batch_size, config.data.sequence_length
    windows = np.random.default_rng((config.seed, number)).integers(1, config.model.vocab_size, (B, T + 1))
    windows[:, T // 2] = eos_id = 0
    return make_batch(windows, bos_id=None, eos_id=eos_id, document_mask=config.model.document_mask)
