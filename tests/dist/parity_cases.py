"""Cases for test_parity.py: each layout in PARITY_CASES (JSON: a list of LayoutCase's fields) trains the
small model, and is saved.

Every case starts and ends together on all ranks. One that fails on all of them is its result; one that fails on some
ends them, and so does one that takes too long: a rank that waits for another would otherwise wait for ever.
"""

import faulthandler
import functools
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.checkpoint.save import save_checkpoint
from pretrain.config import RunConfig
from pretrain.device import detect, new_cpu_group
from pretrain.engine import Engine, agree, build_engine
from pretrain.parallel_dims import ParallelDims, gathered
from pretrain.state import TrainState
from tests.dist.harness import RESULTS
from tests.dist.layout_case import LayoutCase
from tests.small_run import rank_batches

STEPS = 5
CASE_SECONDS = 60
COMPILED_CASE_SECONDS = 300


def trained(engine: Engine, config: RunConfig, data_rank: int, data_world: int) -> dict[str, Any]:
    """Loss and gradient norm of each of STEPS steps, and how many tokens each expert had in it. Collective."""
    curve, load = [], []
    for step in range(STEPS):
        status = agree(engine.train_step(rank_batches(config, step, data_rank, data_world), lr=1e-3 * (step + 1)))
        curve.append([status.loss, status.grad_norm])
        load.append(status.expert_load)
    return {"curve": curve, "expert_load": load}


def train(case: LayoutCase) -> dict[str, Any]:
    """What a layout learns, and the checkpoint after it."""
    config = case.config
    dims = ParallelDims.of_this_rank(config)
    engine = build_engine(config, detect(), dims)
    result = trained(engine, config, dims.data_rank, dims.data_world)
    folder = Path(os.environ["CASE_FOLDER"]) / case.name
    path = save_checkpoint(folder, engine, TrainState(step=STEPS, position=0, tokens=0), config, None, _host_group())
    return {**result, "path": str(path)}


def together(case: Callable[[], dict[str, Any]], seconds: int) -> dict[str, Any]:
    """The result of a case, or how it failed, if it did so on every rank."""
    report = Path(os.environ["CASE_FOLDER"]) / f"{RESULTS}.rank{dist.get_rank()}"
    with open(report, "w") as stacks:
        faulthandler.dump_traceback_later(seconds, exit=True, file=stacks)
        try:
            result = case()
        except Exception:
            result = {"error": traceback.format_exc()}
            print(result["error"], file=stacks, flush=True)
        failures = [found.get("error") for found in gathered(result, dist.group.WORLD)]
        faulthandler.cancel_dump_traceback_later()
    assert all(failures) or not any(failures), f"only some ranks failed: {next(filter(None, failures))}"
    report.unlink()
    return result


@functools.cache
def _host_group() -> dist.ProcessGroup:
    return new_cpu_group()


def _cases() -> dict[str, Callable[[], dict[str, Any]]]:
    cases: dict[str, Callable[[], dict[str, Any]]] = {}
    for values in json.loads(os.environ.get("PARITY_CASES", "[]")):
        case = LayoutCase(**values)
        seconds = COMPILED_CASE_SECONDS if case.compile else CASE_SECONDS
        cases[case.name] = functools.partial(together, functools.partial(train, case), seconds)
    return cases


CASES = _cases()
