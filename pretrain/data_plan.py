"""What a run's config says of its data at each step, before and behind the present one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from data_pipeline.config import StageConfig
from data_pipeline.mixture import effective_weights
from pretrain.config import RunConfig, ScheduleConfig
from pretrain.data_stages import DataStage, Place, Ranges, place_at_step, place_at_tokens

WEIGHT_DIGITS = 9
"""A power may differ in its last digits between machines, and must not look like another mixture there."""


def stage_at(config: RunConfig, place: Place, source_tokens: Mapping[str, int]) -> DataStage:
    """What the config says of the steps from `place` on.

    source_tokens: tokens of each source by name, which a temperature weighs by.
    """
    data, batch = config.data, config.batch
    weights = {source.name: source.weight for source in data.sources}
    caps = {source.name: source.max_epochs for source in data.sources if source.max_epochs is not None}
    stage = DataStage(place, weights, data.sequence_length, batch.global_batch_size, batch.ramp, caps)
    for change in data.stages:
        if _has_begun(change, place):
            stage = replace(
                stage,
                weights=change.weights or stage.weights,
                sequence_length=change.sequence_length or stage.sequence_length,
                global_batch_size=change.global_batch_size or stage.global_batch_size,
                ramp=() if change.global_batch_size else stage.ramp,
            )
    if data.temperature is None:
        return stage
    exact = effective_weights(stage.weights, source_tokens, data.temperature)
    return replace(stage, weights={name: float(f"{weight:.{WEIGHT_DIGITS}g}") for name, weight in exact.items()})


def timeline(
    config: RunConfig, known: Sequence[DataStage], place: Place, left_out: Ranges, source_tokens: Mapping[str, int]
) -> list[DataStage]:
    """The stages on record and those that will follow `place`, as things stand.

    known: on record, by ascending begin, none behind `place`. left_out, source_tokens: as elsewhere here.
    """
    stages = with_stage(known, stage_at(config, place, source_tokens))
    for change in config.data.stages:
        if not _has_begun(change, place):
            reach = place_at_tokens if change.from_step is None else place_at_step
            place = reach(stages[-1], place, left_out, change.begin)
            stages = with_stage(stages, stage_at(config, place, source_tokens))
    return stages


def end_place(stages: Sequence[DataStage], left_out: Ranges, schedule: ScheduleConfig) -> Place:
    """Where a run of these stages stands at the end of its schedule."""
    reach = place_at_tokens if schedule.counts_tokens else place_at_step
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        end = reach(stage, stage.begin, left_out, schedule.total)
        if following is None or end.step <= following.begin.step:
            return end
    raise AssertionError("a run has a stage")


def with_stage(stages: Sequence[DataStage], stage: DataStage) -> list[DataStage]:
    """The stages and this one behind them, if it is news; it takes the place of one in which no step was made."""
    kept = list(stages)
    if kept and stage.continues(kept[-1]):
        return kept
    if kept and kept[-1].begin.step == stage.begin.step:
        kept.pop()
        return with_stage(kept, stage)
    return [*kept, stage]


def _has_begun(change: StageConfig, place: Place) -> bool:
    return (place.tokens if change.from_step is None else place.step) >= change.begin
