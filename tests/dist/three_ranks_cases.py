"""Cases for test_communication.py on three ranks, a number by which 16 bits cannot be divided exactly."""

from collections import defaultdict

import torch
from torch import Tensor

from pretrain.device import detect
from pretrain.engine import build_engine
from pretrain.parallel_dims import ParallelDims
from pretrain.random_batch import random_batch
from tests.dist.communication_cases import BUCKETS, KINDS
from tests.small_run import MODELS, small_config

DEVICE, RANKS = detect(), 3


def first_moments(kind: str, stage: int, section: str) -> dict[str, Tensor]:
    """AdamW's first moments after a step in bf16, what this rank holds of each parameter: the reduced gradient, but for
    a factor."""
    config = small_config(
        "precision=bf16",
        f"batch={{global_batch_size: {2 * RANKS}, micro_batch_size: 1}}",
        f"model.moe={MODELS[kind]}",
        f"parallel.zero_stage={stage}",
        f"deepspeed={section}",
    )
    dims = ParallelDims.of_this_rank(config)
    engine = build_engine(config, DEVICE, dims)
    engine.train_step([random_batch(config, number) for number in range(2 * dims.rank, 2 * dims.rank + 2)], lr=1e-3)
    moments: dict[str, list[Tensor]] = defaultdict(list)
    for piece in engine.pieces():
        if "exp_avg" in piece.views:
            moments[piece.name].append(piece.views["exp_avg"].flatten())
    return {name: torch.cat(parts) for name, parts in moments.items()}


def difference(kind: str, section: str) -> dict[str, float]:
    """Of stage 2 from stage 1, relative in L2, over what rank 0 holds of each parameter."""
    one, two = (first_moments(kind, stage, section) for stage in (1, 2))
    assert one.keys() == two.keys()
    assert all(moment.any() for moment in one.values())
    return {name: float(torch.dist(two[name], moment) / moment.norm()) for name, moment in one.items()}


CASES = {
    f"{kind} {name}": lambda kind=kind, section=section: difference(kind, section)
    for kind in KINDS
    for name, section in BUCKETS.items()
}
