"""Cases for test_fp16.py. torch computes in fp16 on any processor, slowly on most; DeepSpeed is told that it may."""

from typing import Any

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pretrain.device import detect
from pretrain.engine import agree, build_engine
from pretrain.engine_deepspeed import DeepSpeedEngine
from pretrain.parallel_dims import ParallelDims, gathered
from tests.small_run import MODELS, rank_batches, small_config

get_accelerator().is_fp16_supported = lambda: True
MOE = f"model.moe={MODELS['moebias']}"
LAYOUTS = {
    "zero1": "{zero_stage: 1}",
    "zero2-tp2": "{zero_stage: 2, tensor: 2}",
    "zero3": "{zero_stage: 3}",
    "zero3-tp2": "{zero_stage: 3, tensor: 2}",
    "zero2-offload": "{zero_stage: 2, offload_optimizer: cpu}",
}


def engine_of(precision: str, parallel: str, *overrides: str) -> tuple[DeepSpeedEngine, Any]:
    config = small_config(f"precision={precision}", f"parallel={parallel}", *overrides)
    engine = build_engine(config, detect(), ParallelDims.of_this_rank(config))
    assert isinstance(engine, DeepSpeedEngine)
    return engine, config


def step(engine: DeepSpeedEngine, config: Any, number: int) -> list[float]:
    """[loss, grad_norm]"""
    batches = rank_batches(config, number, engine.dims.data_rank, engine.dims.data_world)
    status = agree(engine.train_step(batches, lr=1e-3 * (number + 1)))
    return [status.loss, status.grad_norm]


def curve(precision: str, parallel: str, *overrides: str) -> list[list[float]]:
    engine, config = engine_of(precision, parallel, *overrides)
    found = [step(engine, config, number) for number in range(5)]
    del engine
    return found


def growing(precision: str, parallel: str) -> list[float]:
    """L2 norms of Adam's first moments after each of 3 steps, unclipped; in fp16 the loss scale rises on the way."""
    engine, config = engine_of(precision, parallel, "optimizer.grad_clip=0")
    if precision == "fp16":
        engine.engine.optimizer.loss_scaler.scale_window = 1
    norms = []
    for number in range(3):
        step(engine, config, number)
        squares = [piece.views["exp_avg"].double().square().sum() for piece in engine.pieces() if piece.writer]
        norms.append(sum(gathered(float(sum(squares)), dist.group.WORLD)) ** 0.5)
    if precision == "fp16":
        assert engine.engine.optimizer.loss_scaler.cur_scale > 2.0**16
    return norms


def overflow(parallel: str, *overrides: str) -> dict[str, Any]:
    """Three steps at a loss scale that overflows, then one at a sound scale."""
    engine, config = engine_of("fp16", parallel, *overrides)
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
    "overflow moe": lambda: overflow(LAYOUTS["zero2-tp2"], MOE),
    "moe": lambda: curve("fp16", "{zero_stage: 2, expert: 2}", MOE),
    "moe fp32": lambda: curve("fp32", "{zero_stage: 1}", MOE),
    **{f"growing {n}": lambda n=n: growing("fp16", LAYOUTS[n]) for n in ("zero1", "zero3", "zero2-offload")},
    "growing fp32": lambda: growing("fp32", "{zero_stage: 1}"),
}
