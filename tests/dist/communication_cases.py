"""Cases for test_communication.py: the small model trained with other buckets, with overlap, and deterministically."""

import hashlib
from typing import Any

import torch

from pretrain.device import detect, make_deterministic
from pretrain.engine import agree, build_engine
from pretrain.parallel_dims import ParallelDims
from tests.small_run import MODELS, rank_batches, small_config

DEVICE, STEPS = detect(), 3
STAGES, KINDS = (1, 2, 3), ("dense", "moe")
# Smaller than some parameters, which then go by themselves, and than all together.
BUCKETS = {
    "derived": "{}",
    "small": "{zero_optimization: {reduce_bucket_size: 700}}",
    "small, overlapped": "{zero_optimization: {reduce_bucket_size: 700, overlap_comm: true}}",
}


def trained(kind: str, stage: int, *overrides: str, idle: bool = False) -> list[Any]:
    """[loss, grad_norm] of each step in bf16, and a digest of what this rank then holds of masters and moments.

    idle: from the second step on the first layer's MLP is left out, whose weights then have no gradient.
    """
    config = small_config("precision=bf16", f"model.moe={MODELS[kind]}", f"parallel.zero_stage={stage}", *overrides)
    dims = ParallelDims.of_this_rank(config)
    engine = build_engine(config, DEVICE, dims)
    curve = []
    for step in range(STEPS):
        if idle and step == 1:
            engine.engine.module.layers[0].mlp.forward = torch.zeros_like
        status = agree(engine.train_step(rank_batches(config, step, dims.data_rank, dims.data_world), lr=1e-3))
        curve.append([status.loss, status.grad_norm])
    digest = hashlib.sha256()
    for piece in engine.pieces():
        for view in piece.views.values():
            digest.update(view.contiguous().view(torch.uint8).numpy().tobytes())
    return [*curve, digest.hexdigest()]


def deterministic(kind: str, stage: int) -> list[Any]:
    make_deterministic()
    try:
        return trained(kind, stage, "deterministic=true")
    finally:
        torch.use_deterministic_algorithms(False)


CASES = {
    f"{kind} zero{stage} {name}": lambda kind=kind, stage=stage, section=section: trained(
        kind, stage, f"deepspeed={section}"
    )
    for kind in KINDS
    for stage in STAGES
    for name, section in BUCKETS.items()
} | {
    f"{kind} zero{stage} deterministic": lambda kind=kind, stage=stage: deterministic(kind, stage)
    for kind in KINDS
    for stage in STAGES
}
