"""Cases for test_engines.py: each engine and layout trains the small model; a checkpoint of each loads into each."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.checkpoint.folder import checkpoint_path
from pretrain.checkpoint.load import load_checkpoint
from pretrain.checkpoint.read import read_weights
from pretrain.checkpoint.save import save_checkpoint
from pretrain.config import RunConfig
from pretrain.device import detect, new_cpu_group
from pretrain.engine import Engine, agree, build_decoder, build_engine
from pretrain.engine_torch import TorchEngine
from pretrain.parallel_dims import ParallelDims
from pretrain.state import TrainState
from tests.small_run import rank_batches, small_config

DEVICE, FOLDER = detect(), Path(os.environ["CASE_FOLDER"])
DIMS, GROUP = ParallelDims.of_this_rank(small_config()), new_cpu_group()
STEPS, SAVED_AFTER = 5, 2
LAYOUTS = {
    "torch-fp32": ("torch", ()),
    "torch-bf16": ("torch", ("precision=bf16",)),
    "zero0-fp32": ("deepspeed", ("precision=fp32", "parallel.zero_stage=0")),
    **{f"zero{s}-fp32": ("deepspeed", ("precision=fp32", f"parallel.zero_stage={s}")) for s in (1, 2, 3)},
    **{f"zero{s}-bf16": ("deepspeed", ("precision=bf16", f"parallel.zero_stage={s}")) for s in (1, 2, 3)},
    "zero2-fp32-recompute": (
        "deepspeed",
        ("precision=fp32", "parallel={zero_stage: 2, activation_checkpointing: full}"),
    ),
    "zero3-fp32-recompute": (
        "deepspeed",
        ("precision=fp32", "parallel={zero_stage: 3, activation_checkpointing: full}"),
    ),
    "zero3-fp32-tied": ("deepspeed", ("precision=fp32", "parallel.zero_stage=3", "model.tie_embeddings=true")),
    "zero2-fp32-offload": ("deepspeed", ("parallel={zero_stage: 2, offload_optimizer: cpu}",)),
    "torch-fp32-tied": ("torch", ("precision=fp32", "model.tie_embeddings=true")),
    "zero1-fp32-z": ("deepspeed", ("precision=fp32", "optimizer.z_loss=1e-2")),
    "torch-fp32-z": ("torch", ("precision=fp32", "optimizer.z_loss=1e-2")),
}


def made(layout: str) -> tuple[Engine, RunConfig]:
    kind, overrides = LAYOUTS[layout]
    config = small_config("precision=fp32", *overrides)
    if kind == "torch":
        return TorchEngine(build_decoder(config, DEVICE, torch.float32), config, DEVICE), config
    return build_engine(config, DEVICE, DIMS), config


def stepped(engine: Engine, config: RunConfig, first: int, last: int) -> list[list[float]]:
    """[loss, grad_norm] of each step."""
    curve = []
    for step in range(first, last):
        batches = rank_batches(config, step, DIMS.data_rank, DIMS.data_world)
        status = agree(engine.train_step(batches, lr=1e-3 * (step + 1)))
        curve.append([status.loss, status.grad_norm])
    return curve


def ramp(layout: str) -> list[list[float]]:
    """[loss, grad_norm] of steps with ever other numbers of micro-batches: of this rank's first ones."""
    engine, config = made(layout)
    curve = []
    for step in range(STEPS):
        batches = rank_batches(config, step, DIMS.data_rank, DIMS.data_world)
        status = agree(engine.train_step(batches[: 1 + step % 2], lr=1e-3 * (step + 1)))
        curve.append([status.loss, status.grad_norm])
    return curve


def state_after(step: int) -> TrainState:
    return TrainState(step=step, position=8 * step, tokens=8 * 24 * step)


def weights_digest(weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].numpy().tobytes())
    return digest.hexdigest()


def train(layout: str) -> dict[str, Any]:
    """The curve of an undisturbed run, saved on the way; the weights at the end are left in a file."""
    engine, config = made(layout)
    curve = stepped(engine, config, 0, SAVED_AFTER)
    save_checkpoint(FOLDER / layout, engine, state_after(SAVED_AFTER), config, None, GROUP)
    validation = engine.validation_nll(rank_batches(config, 99, DIMS.data_rank, DIMS.data_world)[0])
    curve += stepped(engine, config, SAVED_AFTER, STEPS)
    path = save_checkpoint(FOLDER / layout, engine, state_after(STEPS), config, None, GROUP)
    dist.all_reduce(validation)
    return {"curve": curve, "path": str(path), "validation": float(validation)}


def resume(source: str, target: str) -> dict[str, Any]:
    """A fresh engine of the target layout goes on from the source's checkpoint."""
    engine, config = made(target)
    state = load_checkpoint(checkpoint_path(FOLDER / source, SAVED_AFTER), engine)
    assert state == state_after(SAVED_AFTER)
    curve = stepped(engine, config, SAVED_AFTER, STEPS)
    path = save_checkpoint(FOLDER / f"{source}-to-{target}", engine, state_after(STEPS), config, None, GROUP)
    return {"curve": curve, "digest": weights_digest(read_weights(path))}


def digest(layout: str) -> str:
    return weights_digest(read_weights(checkpoint_path(FOLDER / layout, STEPS)))


SAME = [name for name in LAYOUTS if name.count("-") == 1]
ACROSS = [
    ("torch-fp32", "zero3-fp32"),
    ("zero3-fp32", "zero1-fp32"),
    ("zero2-fp32", "torch-fp32"),
    ("zero0-fp32", "zero2-fp32"),
    ("zero1-bf16", "zero3-bf16"),
    ("zero3-bf16", "zero2-bf16"),
    ("zero1-fp32", "zero0-fp32"),
]
RAMPED = ("torch-fp32", "torch-bf16", *(f"zero{s}-fp32" for s in range(4)), "zero2-fp32-offload", "zero2-bf16")
CASES = {
    **{f"ramp {name}": lambda name=name: ramp(name) for name in RAMPED},
    **{f"train {name}": lambda name=name: train(name) for name in LAYOUTS},
    **{f"digest {name}": lambda name=name: digest(name) for name in SAME},
    **{f"resume {a} {b}": lambda a=a, b=b: resume(a, b) for a, b in [(name, name) for name in SAME] + ACROSS},
}
