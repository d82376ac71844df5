"""Batches to measure with: nothing is read, and every contender has the same."""

import numpy as np

from data_pipeline.batch import Batch, make_batch
from pretrain.config import RunConfig


def random_batch(config: RunConfig, step: int) -> Batch:
    """Random tokens of a micro-batch, a function of the run's seed and the step; each target counts."""
    shape = (config.batch.micro_batch_size, config.data.sequence_length + 1)
    windows = np.random.default_rng((config.seed, step)).integers(0, config.model.vocab_size, shape)
    return make_batch(windows, bos_id=None, eos_id=-1, document_mask=False)
