"""Validation in the loop: the score on held-out sources, all ranks together, training state untouched.

It is what `steppe eval` says of the same documents, with a window of the run's sequence length.
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from pretrain.config import RunConfig
from pretrain.engine import Engine
from pretrain.evaluation.score import Score
from pretrain.held_out import rank_batches, read_held_out
from pretrain.parallel_dims import ParallelDims, first_of
from pretrain.run_dir import RunDir, read_events


class Validation:
    """The held-out sources of a run, if it validates, ready to be scored again and again: this rank's share of them
    stays in memory."""

    def __init__(self, config: RunConfig, dims: ParallelDims, group: dist.ProcessGroup | None) -> None:
        """Read the sources: the first rank does, for all. Collective; group: of all ranks, on the host.

        Raises on every rank what `read_held_out` does.
        """
        most_targets = config.evaluation.windows * config.data.sequence_length
        self._sources = {}
        for source in config.evaluation.sources if config.evaluation.every_steps else ():
            held_out = first_of(partial(read_held_out, source, most_targets), group)
            self._sources[source.name] = held_out.counts, rank_batches(held_out, config, dims)

    def scores(self, engine: Engine, beat: Callable[[], None] = lambda: None) -> dict[str, Score]:
        """What the model makes of each source. Collective; beat: called before each forward pass."""
        nats = torch.zeros(len(self._sources), dtype=torch.float64, device=engine.device)
        for number, (_, batches) in enumerate(self._sources.values()):
            for batch in batches:
                beat()
                nats[number] += engine.validation_nll(batch)
        if dist.is_initialized():
            dist.all_reduce(nats)
        counted = zip(self._sources.items(), nats.tolist(), strict=True)
        return {name: replace(counts, nats=own) for (name, (counts, _)), own in counted}


def mean_loss(losses: Iterable[float]) -> float:
    """One number of a validation, by which checkpoints are compared: the mean over the sources."""
    return statistics.fmean(losses)


def past_losses(run_dir: RunDir, until_step: int | None = None) -> dict[int, float]:
    """That number of a run's validations so far, by step; of a step validated twice, the later one's.

    until_step: what came after it was of an attempt that was given up.
    """
    if not run_dir.events_path.is_file():
        return {}
    events = read_events(run_dir.events_path, "evaluation")
    known = (event for event in events if until_step is None or event["step"] <= until_step)
    return {event["step"]: mean_loss(score["loss"] for score in event["by_source"].values()) for event in known}


def forget_after(losses: dict[int, float], step: int) -> None:
    """Of a run that has gone back to this step: what came after it is no measure of a checkpoint."""
    for later in [known for known in losses if known > step]:
        del losses[later]
