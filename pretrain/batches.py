"""A run's batches for this rank: the data pipeline's loader, placed where the run stands."""

from collections.abc import Mapping

import torch.distributed as dist

from data_pipeline.batch import Batch
from data_pipeline.loader import Loader
from data_pipeline.manifest import Manifest
from pretrain.config import RunConfig
from pretrain.data_plan import stage_at, timeline
from pretrain.data_stages import DataStage, batches, order_stages
from pretrain.outcome import Outcome, exit_code_of
from pretrain.parallel_dims import ParallelDims, first_of, gathered
from pretrain.state import TrainState


class Batches:
    """This rank's micro-batches of each global batch, from a state's position on; it may be placed elsewhere.

    group: of all ranks, on the host; None on a single one.
    """

    def __init__(
        self, config: RunConfig, state: TrainState, dims: ParallelDims, group: dist.ProcessGroup | None
    ) -> None:
        """Open the sources. Collective. Raises ValueError on every rank if one is unusable."""
        self.config, self.dims, self.group = config, dims, group
        # Looked at once, not by each rank: that is a call a shard of the shared file system.
        paths = [source.path for source in config.data.sources]
        self._manifests: Mapping[str, Manifest] = first_of(lambda: {path: Manifest.load(path) for path in paths}, group)
        self._source_tokens = {source.name: self._manifests[source.path].tokens for source in config.data.sources}
        self._loader = self._placed(state)

    def __next__(self) -> list[Batch]:
        return next(self._loader)

    @property
    def failed(self) -> bool:
        """Whether this rank cannot get its next batch; waits until that is known."""
        return self._loader.failure is not None

    def missing(self, step: int) -> Outcome | None:
        """An outcome if any rank cannot get its next batch. Collective, so that no rank waits for one that gave up."""
        error = self._loader.failure
        own = None if error is None else (exit_code_of(error), str(error) or type(error).__name__)
        for failure in gathered(own, self.group):
            if failure is not None:
                return Outcome("failed", failure[0], step, failure[1])
        return None

    def stage(self, state: TrainState) -> DataStage:
        """What the config says of the next step's data."""
        return stage_at(self.config, state.place, self._source_tokens)

    def place(self, state: TrainState) -> None:
        """Go on from this state's position."""
        self._loader.close()
        self._loader = self._placed(state)

    def close(self) -> None:
        """Stop reading."""
        self._loader.close()

    def _placed(self, state: TrainState) -> Loader:
        config, dims = self.config, self.dims
        stages = timeline(config, state.stages, state.place, state.left_out, self._source_tokens)
        return Loader(
            data=config.data,
            seed=config.seed,
            stages=order_stages(stages),
            data_rank=dims.data_rank,
            data_world=dims.data_world,
            micro_batch_size=config.batch.micro_batch_size,
            document_mask=config.model.document_mask,
            plan=batches(stages, state.place, state.left_out),
            manifests=self._manifests,
        )
