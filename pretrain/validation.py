"""Validation in the loop: the loss on windows of held-out sources, all ranks together, training state untouched."""

import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist

from data_pipeline.batch import Batch
from data_pipeline.config import SourceConfig
from data_pipeline.manifest import Manifest
from data_pipeline.validation import validation_batches
from pretrain.config import RunConfig
from pretrain.engine import Engine
from pretrain.parallel_dims import ParallelDims, first_of, gathered
from pretrain.run_dir import RunDir, read_events


def validate(
    engine: Engine,
    config: RunConfig,
    device: torch.device,
    dims: ParallelDims,
    group: dist.ProcessGroup | None,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean of -log p, nats a token, per source. Every rank makes equally many forwards, so none can hang another.

    beat: called before each of them.

    Raises ValueError on every rank if any cannot read its share.
    """
    losses = {}
    for source in config.evaluation.sources:
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # nll, targets
        for batch in read_together(source, config, dims, group):
            beat()
            sums[0] += engine.validation_nll(batch)
            sums[1] += batch.valid_tokens / config.parallel.ranks_per_sample  # which are all given this batch
        if dist.is_initialized():
            dist.all_reduce(sums)
        nll, tokens = sums.tolist()
        losses[source.name] = nll / tokens
    return losses


def mean_loss(losses: dict[str, float]) -> float:
    """One number of a validation, by which checkpoints are compared: the mean over the sources."""
    return statistics.fmean(losses.values())


def past_losses(run_dir: RunDir, until_step: int | None = None) -> dict[int, float]:
    """That number of a run's validations so far, by step; of a step validated twice, the later one's.

    until_step: what came after it was of an attempt that was given up.
    """
    if not run_dir.events_path.is_file():
        return {}
    events = read_events(run_dir.events_path, "evaluation")
    known = (event for event in events if until_step is None or event["step"] <= until_step)
    return {event["step"]: mean_loss(event["losses"]) for event in known}


def forget_after(losses: dict[int, float], step: int) -> None:
    """Of a run that has gone back to this step: what came after it is no measure of a checkpoint."""
    for later in [known for known in losses if known > step]:
        del losses[later]


def read_together(
    source: SourceConfig, config: RunConfig, dims: ParallelDims, group: dist.ProcessGroup | None
) -> list[Batch]:
    """This rank's batches of a source (at most `evaluation.windows` windows over all ranks, so they fit in memory),
    read before any forward: a rank that cannot read must not leave the others waiting in one."""
    manifest = first_of(lambda: Manifest.load(source.path), group)  # its files are looked at once, not by each rank
    batches: list[Batch] = []
    failure = None
    try:
        batches = list(
            validation_batches(
                source,
                config.data.sequence_length,
                config.batch.micro_batch_size,
                dims.data_rank,
                dims.data_world,
                config.model.document_mask,
                config.evaluation.windows,
                manifest,
                config.data.cache,
            )
        )
    except (ValueError, OSError) as error:
        failure = str(error)
    failures = [found for found in gathered(failure, group) if found is not None]
    if failures:
        raise ValueError(failures[0])
    return batches
