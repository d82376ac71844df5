"""Cases for test_compile.py: a layout trains with and without torch.compile, through all that a run does with a model.

What is compared: loss and gradient norm of each step, the validation loss, how many tokens each expert had, and the
masters at the end. What is counted: how many pieces of code torch compiled in each part of the run, and why it had to
break a block's graph.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from data_pipeline.batch import Batch
from pretrain.config import RunConfig
from pretrain.device import detect
from pretrain.engine import Engine, agree, build_engine
from pretrain.parallel_dims import ParallelDims
from tests.small_run import MODELS, SEQUENCE_LENGTH, rank_batches, small_config

DEVICE = detect()
FP32, BF16 = "precision=fp32", "precision=bf16"
# Small parameters, too, are let go of at stage 3, as large ones are.
RELEASE = "deepspeed={zero_optimization: {stage3_param_persistence_threshold: 1}}"
ON_1_RANK = {
    "dense": (FP32,),
    "recompute-full": (FP32, "parallel={activation_checkpointing: full, activation_checkpointing_every: 2}"),
    "recompute-selective": (FP32, "parallel.activation_checkpointing=selective"),
    "documents": (FP32, "model.document_mask=true"),
    "documents-bf16": (BF16, "model.document_mask=true"),
    "recompute-selective-bf16": (BF16, "parallel.activation_checkpointing=selective"),
    "moe-bf16": (BF16, f"model.moe={MODELS['moebias']}"),
    "moe-fp32": (FP32, f"model.moe={MODELS['moe']}"),
}
ON_2_RANKS = {
    "zero1-bf16": (BF16,),
    "zero3": (FP32, "parallel.zero_stage=3", RELEASE),
    "zero3-recompute": (FP32, "parallel={zero_stage: 3, activation_checkpointing: full}", RELEASE),
    "tensor": (FP32, "parallel.tensor=2"),
    "sequence": (FP32, "parallel.sequence=2"),
    "expert": (BF16, "parallel.expert=2", f"model.moe={MODELS['moe']}"),
}
# In these the compiler goes to the end, C++; in the others it stops before it, which takes most of the time: what it is
# given, and how often, is the same.
TO_THE_END = ("dense", "zero1-bf16")


def trained(config: RunConfig) -> dict[str, Any]:
    """What a run learns, and what was compiled in each part of it."""
    torch._dynamo.reset()
    counters.clear()
    dims = ParallelDims.of_this_rank(config)
    engine = build_engine(config, DEVICE, dims)
    batches = functools.partial(rank_batches, config, rank=dims.data_rank, world=dims.data_world)
    curve, load, compiled = [], [], {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        before = counters["stats"]["unique_graphs"]
        yield
        compiled[name] = counters["stats"]["unique_graphs"] - before

    def step(number: int, length: int = SEQUENCE_LENGTH) -> None:
        status = agree(engine.train_step([_cut(batch, length) for batch in batches(number)], lr=1e-3))
        curve.append([status.loss, status.grad_norm])
        load.append(status.expert_load)

    with part("first step"):
        step(0)
    with part("steps"):
        step(1)
        step(2)
    for name in ("validation", "validation again"):
        with part(name):
            validation = engine.validation_nll(batches(9)[0])
    dist.all_reduce(validation)
    with part("step after validation"):
        step(3)
    with part("shorter"):
        step(4, SEQUENCE_LENGTH // 2)
    with part("length as before"):
        step(5)
    breaks = sorted({reason.splitlines()[0] for reason in counters["graph_break"]})
    return {
        "curve": curve,
        "load": load,
        "validation": validation.item(),
        "compiled": compiled,
        "breaks": breaks,
        "skipped": counters["frames"]["total"] - counters["frames"]["ok"],
        "masters": _masters(engine),
    }


def compared(name: str) -> dict[str, Any]:
    """A compiled run's counts, and how far it is from the same run uncompiled."""
    with pytest.MonkeyPatch.context() as patch:
        if name not in TO_THE_END:
            patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
        overrides = _OF_THIS_WORLD[name]
        ours, plain = (trained(small_config(*overrides, f"parallel.compile={word}")) for word in ("true", "false"))
    assert not any(plain["compiled"].values())
    masters, expected = ours.pop("masters"), plain.pop("masters")
    return {
        "compiled": ours["compiled"],
        "breaks": ours["breaks"],
        "skipped": ours["skipped"],
        "curve": [ours["curve"], plain["curve"]],
        "load": [ours["load"], plain["load"]],
        "validation": [ours["validation"], plain["validation"]],
        "masters": max((masters[name] - value).abs().max().item() for name, value in expected.items()),
    }


def _masters(engine: Engine) -> dict[str, torch.Tensor]:
    return {f"{piece.name} {piece.box}": piece.views["fp32"].clone() for piece in engine.pieces()}


def _cut(batch: Batch, length: int) -> Batch:
    """The first tokens of each sequence."""

    def of(array: np.ndarray) -> np.ndarray:
        return array[:, :length].copy()

    positions, ids = (None if array is None else of(array) for array in (batch.positions, batch.document_ids))
    return Batch(of(batch.tokens), of(batch.targets), positions, ids)


_OF_THIS_WORLD = ON_1_RANK if dist.get_world_size() == 1 else ON_2_RANKS
_CHOSEN = os.environ.get("COMPILE_CASES", " ".join(_OF_THIS_WORLD)).split()
CASES = {name: functools.partial(compared, name) for name in _CHOSEN}
