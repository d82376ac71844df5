"""A small config and its batches, the same on any number of ranks: valid targets fall unequally on samples."""

import functools
from pathlib import Path

import numpy as np

from data_pipeline.batch import Batch
from pretrain.config import RunConfig
from pretrain.layout import micro_batches
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
# `model.moe` of the small model: none; every layer Qwen3's way; the second layer DeepSeek-V3's way.
MODELS = {
    "dense": "null",
    "moe": "{experts: 4, experts_per_token: 2, expert_ffn_size: 16, balance_coefficient: 0.1, z_loss: 1e-2}",
    "moebias": "{experts: 8, experts_per_token: 2, expert_ffn_size: 16, shared_experts: 1, first_layer: 1, "
    "router: sigmoid, balance: bias, bias_update_rate: 0.05, groups: 4, groups_per_token: 2, "
    "routed_scaling_factor: 2.5}",
}


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


@functools.cache
def documents(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and document ids (GLOBAL_BATCH, T) of a step: documents of 1 token up to the whole window."""
    random = np.random.default_rng([step, 1])
    starts = random.random((GLOBAL_BATCH, SEQUENCE_LENGTH)) < np.linspace(0, 0.5, GLOBAL_BATCH)[:, None]
    starts[:, 0] = False
    places = np.arange(SEQUENCE_LENGTH)
    first = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    return places - first, np.cumsum(starts, axis=1)


def rank_batches(config: RunConfig, step: int, rank: int, world: int) -> list[Batch]:
    """A rank's micro-batches of a step, cut into documents if the model keeps them apart."""
    tokens, targets = global_batch(step)
    positions, document_ids = documents(step) if config.model.document_mask else (None, None)
    size, count = config.batch.micro_batch_size, micro_batches(config, GLOBAL_BATCH, world)

    def micro_batch(start: int) -> Batch:
        rows = slice(start, start + size)
        if positions is None or document_ids is None:
            return Batch(tokens[rows].copy(), targets[rows].copy(), None, None)
        return Batch(*(array[rows].copy() for array in (tokens, targets, positions, document_ids)))

    return [micro_batch(start) for start in range(rank * count * size, (rank + 1) * count * size, size)]
