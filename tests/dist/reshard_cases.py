"""Cases for test_reshard.py: a run of each layout goes on from its own checkpoint, and from that of the one before."""

import gc
import os
from pathlib import Path
from typing import Any

from pretrain.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from pretrain.device import detect, new_cpu_group
from pretrain.engine import agree, build_engine
from pretrain.parallel_dims import ParallelDims
from pretrain.state import TrainState
from tests.small_run import MODELS, rank_batches, small_config

FOLDER, GROUP = Path(os.environ["CASE_FOLDER"]), new_cpu_group()
STEPS, SAVED_AFTER = 4, 2
DENSE = {
    "tp2-zero1": "{tensor: 2, zero_stage: 1}",
    "tp4-zero3": "{tensor: 4, zero_stage: 3}",
    "sp2-zero2": "{sequence: 2, zero_stage: 2, offload_optimizer: cpu}",
    "tp2-sp2-zero0": "{tensor: 2, sequence: 2, zero_stage: 0}",
}
MOE = {
    "ep4-zero2": "{expert: 4, zero_stage: 2}",
    "ep2-tp2-zero1": "{expert: 2, tensor: 2, zero_stage: 1}",
    "ep2-zero3": "{expert: 2, zero_stage: 3}",
    "ep1-sp2-zero0": "{sequence: 2, zero_stage: 0}",
}
# Routers stay fp32, at ZeRO 3 beside what DeepSpeed holds.
MOE_BF16 = {
    "ep2-zero3": "{expert: 2, zero_stage: 3}",
    "ep2-tp4-zero3": "{expert: 2, tensor: 4, zero_stage: 3}",
    "ep2-zero2": "{expert: 2, zero_stage: 2}",
    "tp2-zero3": "{tensor: 2, zero_stage: 3, offload_optimizer: cpu, offload_parameters: cpu}",
}
FAMILIES = {
    "dense": (DENSE, ["precision=fp32"]),
    "muon": ({name: DENSE[name] for name in ("tp2-zero1", "tp2-sp2-zero0")}, ["precision=fp32", "optimizer.name=muon"]),
    "moe-bf16": (MOE_BF16, ["precision=bf16", f"model.moe={MODELS['moe']}"]),
    "moe": (MOE, ["precision=fp32", f"model.moe={MODELS['moebias']}"]),
}


def run(family: str, layout: str, load_from: str | None) -> list[list[float]]:
    """[loss, grad_norm] of the steps from the beginning, saved on the way, or of those after a checkpoint."""
    layouts, settings = FAMILIES[family]
    config = small_config(*settings, f"parallel={layouts[layout]}")
    dims = ParallelDims.of_this_rank(config)
    engine = build_engine(config, detect(), dims)
    if load_from is not None:
        load_checkpoint(checkpoint_path(FOLDER / family / load_from, SAVED_AFTER), engine, GROUP)
    curve = []
    for step in range(SAVED_AFTER if load_from else 0, STEPS):
        status = agree(engine.train_step(rank_batches(config, step, dims.data_rank, dims.data_world), 1e-3 * (step + 1)))
        curve.append([status.loss, status.grad_norm])
        if load_from is None and step + 1 == SAVED_AFTER:
            state = TrainState(step=SAVED_AFTER, position=0, tokens=0)
            save_checkpoint(FOLDER / family / layout, engine, state, config, "none", GROUP)
    del engine
    gc.collect()
    return curve


CASES: dict[str, Any] = {}
for family, (layouts, _) in FAMILIES.items():
    names = list(layouts)
    for name in names:
        CASES[f"{family} {name}"] = lambda family=family, name=name: run(family, name, None)
    for previous, name in zip([names[-1], *names], names, strict=False):
        CASES[f"{family} {name} from {name}"] = lambda family=family, name=name: run(family, name, name)
        CASES[f"{family} {name} from {previous}"] = lambda f=family, n=name, p=previous: run(f, n, p)
