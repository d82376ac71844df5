"""Cases for test_convergence.py: our engines over 20 steps of the small model, on one rank."""

from collections.abc import Callable
from typing import Any

import torch

from pretrain.device import detect
from pretrain.engine import Engine, agree, build_decoder, build_engine
from pretrain.engine_torch import TorchEngine
from pretrain.parallel_dims import ParallelDims
from pretrain.schedule import learning_rate
from tests.small_run import rank_batches, small_config

STEPS, CYCLE = 20, 4  # the same four batches again and again, so that the loss has somewhere to go
DEVICE = detect()


def convergence_config(tied: bool) -> Any:
    return small_config(
        "precision=fp32",
        "batch.micro_batch_size=4",
        "optimizer={lr: 1e-2, weight_decay: 0.3, grad_clip: 0.5}",
        f"schedule={{warmup_steps: 4, total_steps: {STEPS}, min_lr_ratio: 0.1}}",
        f"model.tie_embeddings={'true' if tied else 'false'}",
    )


def curve(tied: bool, build: Callable[[Any], Engine]) -> list[list[float]]:
    """[loss, gradient norm] of each step."""
    config = convergence_config(tied)
    engine = build(config)
    statuses = []
    for step in range(STEPS):
        batches = rank_batches(config, step % CYCLE, rank=0, world=1)
        statuses.append(agree(engine.train_step(batches, learning_rate(config, step, tokens=0, tokens_in_step=1))))
    return [[status.loss, status.grad_norm] for status in statuses]


def oracle(config: Any) -> Engine:
    return TorchEngine(build_decoder(config, DEVICE, torch.float32), config, DEVICE)


def deepspeed(config: Any) -> Engine:
    return build_engine(config, DEVICE, ParallelDims.of_this_rank(config))


CASES = {
    f"{name}-{'tied' if tied else 'untied'}": lambda tied=tied, build=build: curve(tied, build)
    for name, build in (("torch", oracle), ("zero1", deepspeed))
    for tied in (False, True)
}
