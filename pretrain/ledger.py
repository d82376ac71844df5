"""What a run reads at each of its steps, past or to come: from its config and its place alone, nothing is replayed."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import numpy as np

from data_pipeline.documents import DocumentPart, Documents
from data_pipeline.manifest import Manifest
from data_pipeline.order import Consumed
from data_pipeline.run_order import open_order
from data_pipeline.token_source import open_sources
from pretrain.checkpoint.folder import newest_checkpoint
from pretrain.checkpoint.index import read_index
from pretrain.config import RunConfig
from pretrain.data_plan import end_place, timeline
from pretrain.data_stages import DataStage, Place, order_stages, place_at_step, stage_of, stretches
from pretrain.recipe import load_config
from pretrain.run_dir import RunDir
from pretrain.state import TrainState


@dataclass(frozen=True)
class StepData:
    """The samples of one step: those of positions `[first, first + size)`."""

    step: int
    first: int
    size: int
    stage: DataStage


@dataclass(frozen=True)
class SampleContent:
    """One sample and the documents that it is made of."""

    position: int
    source: str
    epoch: int
    parts: list[DocumentPart]


def state_on_record(run: RunDir) -> TrainState:
    """Where a run stands by its newest checkpoint; at its start if it has none."""
    newest = newest_checkpoint(run.checkpoints)
    if newest is None:
        return TrainState()
    trainer = read_index(newest).trainer
    assert trainer is not None, "a run's checkpoint is not of weights alone"
    return TrainState.from_state_dict(trainer)


def check_order(config: RunConfig, state: TrainState, manifests: Mapping[str, Manifest]) -> str:
    """Raise ValueError if the sources cannot be read as the config says, or end before the run does.

    manifests: of the sources, by path. Returns how often the run will have read each of them, in words.
    """
    with closing(Ledger(config, state, manifests)) as ledger:
        end, last = ledger.end(), ledger.order.ends_at
        if last is not None and last < end.position:
            raise ValueError(
                f"data.sources: their max_epochs let the data end with sample {last:,}, and the run reads "
                f"{end.position:,} samples in its {end.step:,} steps: raise max_epochs, add data, or train for less"
            )
        read = ", ".join(f"{name} {count.epochs or 0:.3g}" for name, count in ledger.consumed(end).items())
        return f"by step {end.step:,} the run will have read each source so many times: {read}"


class Ledger:
    """Of one run. Opens its data folders; `close` it."""

    def __init__(self, config: RunConfig, state: TrainState, manifests: Mapping[str, Manifest]) -> None:
        """manifests: of the run's sources, by path.

        Raises ValueError if a data folder is unusable, OSError if it cannot be read now.
        """
        self.config, self.state = config, state
        state.leave_out(config.skips.data)
        self.manifests = manifests
        self.source_tokens = {source.name: manifests[source.path].tokens for source in config.data.sources}
        # What lies elsewhere is kept only while it is looked at: the cache's disk is one of the nodes'.
        self._scratch = TemporaryDirectory(prefix="steppe-ledger-")
        cache = config.data.cache
        if cache.folder is not None:
            cache = cache.model_copy(update={"folder": self._scratch.name})
        self.sources = open_sources(config.data.sources, manifests, cache)
        self.stages = timeline(config, state.stages, state.place, state.left_out, self.source_tokens)
        self.order = open_order(config.data, config.seed, order_stages(self.stages), self.sources)

    @classmethod
    def of_run(cls, run: RunDir) -> "Ledger":
        """As things stand: what is on record in the newest checkpoint, and what the config says of the rest."""
        config = load_config(run.config_path)
        manifests = {source.path: Manifest.load(source.path) for source in config.data.sources}
        return cls(config, state_on_record(run), manifests)

    def close(self) -> None:
        """Close the data folders."""
        for source in self.sources.values():
            source.close()
        self._scratch.cleanup()

    def place(self, step: int) -> Place:
        """Where the run stands after so many steps."""
        stage = stage_of(self.stages, step)
        return place_at_step(stage, stage.begin, self.state.left_out, step)

    def end(self) -> Place:
        """Where the run stands at the end of its schedule."""
        return end_place(self.stages, self.state.left_out, self.config.schedule)

    def step(self, step: int) -> StepData:
        """What step `step`, the first being 1, reads."""
        assert step >= 1
        stage = stage_of(self.stages, step - 1)
        stretch = next(stretches(stage, self.place(step - 1), self.state.left_out))
        return StepData(step, stretch.first, stretch.size, stage)

    def samples(self, positions: np.ndarray) -> Iterator[SampleContent]:
        """The samples of these positions, with their documents. Raises ValueError if data is damaged, OSError."""
        documents = {name: Documents(source) for name, source in self.sources.items()}
        picked = self.order.samples(positions)
        for i, position in enumerate(positions.tolist()):
            source, cut, number = int(picked.source[i]), int(picked.cut[i]), picked.number[i : i + 1]
            name = self.order.sources[source]
            extents = self.order.extents(source, cut, number)
            runs = zip(extents.start.tolist(), extents.count.tolist(), strict=True)
            parts = [part for start, count in runs for part in documents[name].parts(start, count)]
            yield SampleContent(position, name, int(picked.epoch[i]), parts)

    def consumed(self, place: Place) -> Mapping[str, Consumed]:
        """What each source has served before a place."""
        return self.order.consumed_before(place.position)
