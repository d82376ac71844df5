"""A small config and its batches, the same on any number of ranks: valid targets fall unequally on samples."""

import functools
from pathlib import Path

import numpy as np

from data_pipeline.batch import Batch
from pretrain.config import RunConfig, micro_batches
from pretrain.recipe import load_config

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "58m.yaml"
VOCABULARY, SEQUENCE_LENGTH, GLOBAL_BATCH = 300, 24, 8
SMALL = (
    f"model={{hidden_size: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, ffn_size: 48, vocab_size: {VOCABULARY}}}",
    f"data.sequence_length={SEQUENCE_LENGTH}",
    "batch={global_batch_size: 8, micro_batch_size: 2}",
    "optimizer={lr: 3e-3, grad_clip: 0.1}",
    "schedule={warmup_steps: 2, total_steps: 8}",
)


def small_config(*overrides: str) -> RunConfig:
    """The small config, with overrides."""
    return load_config(RECIPE, [*SMALL, *overrides])


@functools.cache
def global_batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets (GLOBAL_BATCH, T) of a step. Later samples have fewer valid targets, the last has none."""
    random = np.random.default_rng(step)
    windows = random.integers(0, VOCABULARY, (GLOBAL_BATCH, SEQUENCE_LENGTH + 1))
    tokens, targets = windows[:, :-1].copy(), windows[:, 1:].copy()
    ignored = random.random(targets.shape) < np.linspace(0, 1, GLOBAL_BATCH)[:, None]
    targets[ignored] = -100
    return tokens, targets


def rank_batches(config: RunConfig, step: int, rank: int, world: int) -> list[Batch]:
    """A rank's micro-batches of a step."""
    tokens, targets = global_batch(step)
    size, count = config.batch.micro_batch_size, micro_batches(config, GLOBAL_BATCH, world)
    starts = range(rank * count * size, (rank + 1) * count * size, size)
    return [Batch(tokens[i : i + size].copy(), targets[i : i + size].copy(), None, None) for i in starts]
