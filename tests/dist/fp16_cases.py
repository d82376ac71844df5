"""Cases for test_fp16.py. torch computes in fp16 on any processor, slowly on most; DeepSpeed is told that it may."""

import gc
from typing import Any

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pretrain.device import detect
from pretrain.engine import agree, build_engine
from pretrain.engine_deepspeed import DeepSpeedEngine
from pretrain.parallel_dims import ParallelDims, gathered
from tests.small_run import rank_batches, small_config

get_accelerator().is_fp16_supported = lambda: True
LAYOUTS = {
    "zero1": "{zero_stage: 1}",
    "zero2-tp2": "{zero_stage: 2, tensor: 2}",
    "zero3": "{zero_stage: 3}",
    "zero3-tp2": "{zero_stage: 3, tensor: 2}",
    "zero2-offload": "{zero_stage: 2, offload_optimizer: cpu}",
}


def engine_of(precision: str, parallel: str) -> tuple[DeepSpeedEngine, Any]:
    config = small_config(f"precision={precision}", f"parallel={parallel}")
    engine = build_engine(config, detect(), ParallelDims.of_this_rank(config))
    assert isinstance(engine, DeepSpeedEngine)
    return engine, config


def step(engine: DeepSpeedEngine, config: Any, number: int) -> list[float]:
    """[loss, grad_norm]"""
    batches = rank_batches(config, number, engine.dims.data_rank, engine.dims.data_world)
    status = agree(engine.train_step(batches, lr=1e-3 * (number + 1)))
    return [status.loss, status.grad_norm]


def curve(precision: str, parallel: str) -> list[list[float]]:
    engine, config = engine_of(precision, parallel)
    found = [step(engine, config, number) for number in range(5)]
    del engine
    gc.collect()
    return found


def overflow(parallel: str) -> dict[str, Any]:
    """Three steps at a loss scale that overflows, then one at a sound scale."""
    engine, config = engine_of("fp16", parallel)
    scaler = engine.engine.optimizer.loss_scaler
    scaler.cur_scale = 2.0**60
    before = [view.clone() for piece in engine.pieces() for view in piece.views.values()]
    norms = [step(engine, config, 0)[1] for _ in range(3)]
    after = [view for piece in engine.pieces() for view in piece.views.values()]
    unchanged = all(a.equal(b) for a, b in zip(before, after, strict=True))
    scales = gathered(scaler.cur_scale, dist.group.WORLD)
    saved = engine.scalars()
    scaler.cur_scale = 2.0**10
    return {
        "norms": norms,
        "unchanged": all(gathered(unchanged, dist.group.WORLD)),
        "scales": scales,
        "skipped": saved["counters"]["skipped_steps"],
        "saved_scale": saved["loss_scaler"]["cur_scale"],
        "then": step(engine, config, 0),
    }


CASES = {
    "fp32": lambda: curve("fp32", "{zero_stage: 1}"),
    **{name: lambda parallel=parallel: curve("fp16", parallel) for name, parallel in LAYOUTS.items()},
    **{f"overflow {name}": lambda name=name: overflow(LAYOUTS[name]) for name in ("zero2-tp2", "zero3")},
}
