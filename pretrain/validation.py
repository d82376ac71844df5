"""Validation in the loop: the loss on windows of held-out sources, all ranks together, training state untouched."""

import torch
import torch.distributed as dist

from data_pipeline.loader import validation_batches
from pretrain.config import RunConfig
from pretrain.engine import Engine
from pretrain.parallel_dims import ParallelDims


def validate(engine: Engine, config: RunConfig, device: torch.device, dims: ParallelDims) -> dict[str, float]:
    """Mean of -log p, nats a token, per source. Every rank makes equally many forwards, so none can hang another."""
    losses = {}
    for source in config.evaluation.sources:
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # nll, targets
        for batch in validation_batches(
            source,
            config.data.sequence_length,
            config.batch.micro_batch_size,
            dims.data_rank,
            dims.data_world,
            config.model.document_mask,
            config.evaluation.windows,
        ):
            sums[0] += engine.validation_nll(batch)
            sums[1] += batch.valid_tokens
        if dist.is_initialized():
            dist.all_reduce(sums)
        nll, tokens = sums.tolist()
        losses[source.name] = nll / tokens
    return losses
