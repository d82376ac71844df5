"""`steppe data mix`: from a step on, a run reads another mixture, other lengths or other batches."""

import json
from typing import Any

from data_pipeline.config import StageConfig
from launch.run_checks import check_ranks
from launch.run_folder import Change, check_run, checked_change
from pretrain.config import RunConfig
from pretrain.ledger import state_on_record
from pretrain.recipe import apply_overrides, load_config, validated_as
from pretrain.run_dir import RunDir, read_json

STAGE_KEYS = ("weights", "sequence_length", "global_batch_size")


def mixed(run: RunDir, unit: str, begin: int, overrides: list[str], drop: bool = False) -> Change:
    """The change of a run by which a stage begins so many steps or tokens (`unit`) after its start, or no longer does.

    overrides: `weights.NAME=W` (null takes a source out), `weights={...}`, `sequence_length=T`, `global_batch_size=B`;
    what is not named stays as the stage before has it. drop: the stage that begins there goes, and none comes.

    Raises ValueError if it is not a run, the stage is none, or lies behind what the run has saved.
    """
    check_run(run)
    config = load_config(run.config_path)
    _check_unit(config, unit)
    _check_is_to_come(run, unit, begin)
    others = [stage for stage in config.data.stages if stage.begin != begin]
    if drop:
        _check_is_there(config, unit, begin, overrides)
    else:
        others.append(_stage(config, unit, begin, overrides))
    stages = sorted(others, key=lambda stage: stage.begin)
    listed = [stage.model_dump(mode="json", exclude_none=True) for stage in stages]
    change = checked_change(run, [f"data.stages={json.dumps(listed)}"], [])
    if run.environment_path.is_file():
        check_ranks(change.new, int(read_json(run.environment_path)["ranks"]))
    return change


def _check_is_there(config: RunConfig, unit: str, begin: int, overrides: list[str]) -> None:
    if overrides:
        raise ValueError(
            f"--set {overrides[0]} does not go with --drop, which takes a stage away: leave one of them out"
        )
    if all(stage.begin != begin for stage in config.data.stages):
        begins = ", ".join(str(stage.begin) for stage in config.data.stages)
        known = f"stages begin at {begins}" if begins else "the run has no stages"
        raise ValueError(f"--at-{unit} {begin} --drop: no stage begins there ({known})")


def _check_unit(config: RunConfig, unit: str) -> None:
    for stage in config.data.stages:
        known = "tokens" if stage.from_step is None else "step"
        if known != unit:
            raise ValueError(
                f"--at-{unit}: the stages of this run begin by {known} (data.stages), and all are to be in one unit: "
                f"use --at-{known}"
            )


def _check_is_to_come(run: RunDir, unit: str, begin: int) -> None:
    state = state_on_record(run)
    reached = state.tokens if unit == "tokens" else state.step
    if begin < reached:
        raise ValueError(
            f"--at-{unit} {begin} lies behind the newest checkpoint, of {reached} {unit.rstrip('s')}s: what was read "
            f"stays on record; give {reached} or more"
        )


def _stage(config: RunConfig, unit: str, begin: int, overrides: list[str]) -> StageConfig:
    """The stage that the overrides describe, on top of one that begins there already and of the mixture in force."""
    if not overrides:
        raise ValueError(f"nothing to change: give --set KEY=VALUE, KEY one of {', '.join(STAGE_KEYS)}")
    tree: dict[str, Any] = {"weights": _weights_before(config, begin)}
    here = next((stage for stage in config.data.stages if stage.begin == begin), None)
    if here is not None:
        tree |= here.model_dump(mode="json", exclude_none=True, include=set(STAGE_KEYS))
    before = tree["weights"]
    tree = apply_overrides(tree, overrides)
    if isinstance(tree["weights"], dict):
        tree["weights"] = {name: weight for name, weight in tree["weights"].items() if weight is not None}
        if tree["weights"] == before and (here is None or here.weights is None):
            del tree["weights"]
    return validated_as(StageConfig, tree | {"from_step" if unit == "step" else "from_tokens": begin})


def _weights_before(config: RunConfig, begin: int) -> dict[str, float]:
    weights = {source.name: source.weight for source in config.data.sources}
    for stage in config.data.stages:
        if stage.begin < begin and stage.weights:
            weights = stage.weights
    return weights
