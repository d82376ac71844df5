"""Cases for test_reshard.py, as the environment names them: a layout is trained and saved on the way, or goes on from
the checkpoint of another (`reshard_pairs.py`). What RunDir, recorder and launcher add to that, test_run.py tests.
"""

import functools
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pretrain.batches import Batches
from pretrain.checkpoint.load import load_newest
from pretrain.checkpoint.save import save_checkpoint
from pretrain.config import RunConfig
from pretrain.device import detect, new_cpu_group
from pretrain.engine import Engine, agree, build_engine
from pretrain.engine_deepspeed import DeepSpeedEngine
from pretrain.parallel_dims import ParallelDims
from pretrain.schedule import learning_rate
from pretrain.state import TrainState
from tests.dist.reshard_pairs import LAYOUTS, LOADS, SAME, SAVED_AFTER, STEPS, Load, SavedLayout
from tests.small_run import SEQUENCE_LENGTH

FOLDER = Path(os.environ["RESHARD_FOLDER"])
# The mixture changes before the checkpoint; and a step after it once more, with the sequence length.
STAGES = (
    "data.stages=[{from_step: 1, weights: {first: 3, second: 1}}, "
    f"{{from_step: 4, weights: {{second: 1}}, sequence_length: {2 * SEQUENCE_LENGTH}}}]"
)
# A loss scale that is not the first one, and rises at every step but the first: state that must travel.
FP16_SCALER = {"cur_scale": 2.0**10, "scale_window": 1}

# torch computes in fp16 on any processor, slowly on most; DeepSpeed is told that it may.
get_accelerator().is_fp16_supported = lambda: True


def train(layout: SavedLayout) -> dict[str, Any]:
    """[loss, grad_norm] of each step of a run that nothing disturbs, saved on the way."""
    config, dims, engine = started(layout)
    if layout.precision == "fp16":
        assert isinstance(engine, DeepSpeedEngine)
        vars(engine.engine.optimizer.loss_scaler).update(FP16_SCALER)
    state = TrainState()
    curve = steps(engine, config, dims, state, SAVED_AFTER)
    save_checkpoint(FOLDER / layout.name, engine, state, config, None, host_group())
    return {"curve": curve + steps(engine, config, dims, state, STEPS)}


def resume(load: Load) -> dict[str, Any]:
    """What a layout knows right after a load, saved again as it is, and [loss, grad_norm] of the steps from there."""
    config, dims, engine = started(load.target)
    restored = load_newest(FOLDER / load.source.name, engine, host_group())
    assert restored.checkpoint is not None, restored.passed_over
    state = restored.state
    loaded = {"trainer": state.state_dict(), "engine": engine.scalars()}
    save_checkpoint(FOLDER / load.name, engine, state, config, None, host_group())
    return {**loaded, "curve": steps(engine, config, dims, state, STEPS)}


def started(layout: SavedLayout) -> tuple[RunConfig, ParallelDims, Engine]:
    """The engine of a layout at step 0."""
    config, dims = prepared(layout)
    return config, dims, build_engine(config, detect(), dims)


def steps(engine: Engine, config: RunConfig, dims: ParallelDims, state: TrainState, until: int) -> list[list[float]]:
    """[loss, grad_norm] of each step from where the state is. Data and learning rate follow from the state alone."""
    curve = []
    with closing(Batches(config, state, dims, host_group())) as batches:
        while state.step < until:
            state.begin_stage(batches.stage(state))
            tokens = config.batch.global_batch_size * state.stages[-1].sequence_length
            lr = learning_rate(config, state.step, state.tokens, tokens)
            status = agree(engine.train_step(next(batches), lr))
            state.advance(config.batch.global_batch_size, tokens)
            curve.append([status.loss, status.grad_norm])
    return curve


@functools.cache
def prepared(layout: SavedLayout) -> tuple[RunConfig, ParallelDims]:
    """A layout's config, and the process groups that its cases share."""
    config = layout.config(*os.environ["RESHARD_CORPUS"].splitlines(), STAGES)
    return config, ParallelDims.of_this_rank(config)


@functools.cache
def host_group() -> dist.ProcessGroup | None:
    """As the training loop has it."""
    return new_cpu_group() if dist.get_world_size() > 1 else None


def _cases() -> dict[str, Callable[[], dict[str, Any]]]:
    known = {layout.name: functools.partial(train, layout) for layout in LAYOUTS}
    known |= {load.name: functools.partial(resume, load) for load in (*SAME, *LOADS)}
    return {name: known[name] for name in os.environ["RESHARD_CASES"].splitlines()}


CASES = _cases()
