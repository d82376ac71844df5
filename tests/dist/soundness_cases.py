"""Cases for test_soundness.py: updates that are left out, and replicas that have come apart, on four ranks."""

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from pretrain.boxes import Box, slices
from pretrain.config import RunConfig
from pretrain.device import detect
from pretrain.engine import Engine, agree, build_decoder, build_engine
from pretrain.engine_deepspeed import DeepSpeedEngine
from pretrain.engine_torch import TorchEngine
from pretrain.parallel_dims import ParallelDims, gathered
from tests.dist.layout_case import LayoutCase
from tests.small_run import rank_batches

get_accelerator().is_fp16_supported = lambda: True  # torch computes in it on any processor, slowly on most
DEVICE, RANK, WORLD = detect(), dist.get_rank(), dist.get_world_size()
NORM, ROUTER = "layers.0.input_layernorm.weight", "layers.1.mlp.router.weight"
EXPERTS, BIAS = "layers.1.mlp.experts.up_proj", "layers.1.mlp.router.bias"
QUERY, KEY = "layers.1.self_attn.q_proj.weight", "layers.1.self_attn.k_proj.weight"
# Which layout, and the parameter whose gradient is broken on one rank.
SKIPPED = {
    "zero0-moebias": (LayoutCase(zero_stage=0, model="moebias"), ROUTER),
    "zero0-tp2-muon": (LayoutCase(zero_stage=0, tensor=2, optimizer="muon"), NORM),
    "zero1-tp2": (LayoutCase(zero_stage=1, tensor=2, num_kv_heads=1), NORM),
    "zero1-bf16-ep2-moebias": (LayoutCase(zero_stage=1, expert=2, model="moebias", precision="bf16"), EXPERTS),
    "zero2-sp2-muon-bf16": (LayoutCase(zero_stage=2, sequence=2, optimizer="muon", precision="bf16"), NORM),
    "zero2-offload": (LayoutCase(zero_stage=2, offload="optimizer"), NORM),
    "zero3-tp2-ep4-moebias": (LayoutCase(zero_stage=3, tensor=2, expert=4, model="moebias"), EXPERTS),
    "zero3-bf16-moebias": (LayoutCase(zero_stage=3, expert=2, model="moebias", precision="bf16"), ROUTER),
    "zero3-offload-all": (LayoutCase(zero_stage=3, offload="all"), NORM),
}
# What one rank then holds otherwise: of a parameter what forward uses, or this rank's share of its master.
FLIPPED: dict[str, list[tuple[str, Literal["live", "master"]]]] = {
    "zero0-moebias": [(NORM, "live"), (BIAS, "live")],
    "zero1-tp2": [(QUERY, "live"), (KEY, "master")],
    "zero1-bf16-ep2-moebias": [(EXPERTS, "live")],
    "zero2-offload": [(NORM, "live")],
    "zero3-tp2-ep4-moebias": [(NORM, "master")],
    "zero3-bf16-moebias": [(ROUTER, "live")],
}
SCALED = {"zero1-fp16-tp2": LayoutCase(zero_stage=1, tensor=2), "zero3-fp16": LayoutCase(zero_stage=3)}
STEPS = 4
BAD: dict[int, Literal["gradient", "loss"]] = {0: "gradient", 2: "loss"}  # before there is any state, and after
BROKEN_RANK = 1  # where ranks hold copies for each other, not the one that counts


def deepspeed_engine(config: RunConfig) -> DeepSpeedEngine:
    engine = build_engine(config, DEVICE, ParallelDims.of_this_rank(config))
    assert isinstance(engine, DeepSpeedEngine)
    return engine


def step(engine: Engine, config: RunConfig, number: int, skip: bool = False) -> list[float]:
    """[loss, grad_norm]"""
    alone = isinstance(engine, TorchEngine)
    dims = ParallelDims.of_this_rank(config)
    rank, world = (RANK, WORLD) if alone else (dims.data_rank, dims.data_world)
    status = agree(engine.train_step(rank_batches(config, number, rank, world), lr=1e-3 * (number + 1), skip=skip))
    return [status.loss, status.grad_norm]


def bits(engine: DeepSpeedEngine) -> str:
    """A digest of all that a step changes on this rank."""
    held = [view for piece in engine.pieces() for view in piece.views.values()]
    held += [getattr(parameter, "ds_tensor", parameter) for parameter in engine.engine.module.parameters()]
    optimizers = [engine.engine.basic_optimizer, engine.apart.optimizer]
    held += [state["step"] for optimizer in optimizers if optimizer for state in optimizer.state.values()]
    digest = hashlib.sha256()
    for tensor in held:
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def broken(engine: DeepSpeedEngine, what: Literal["gradient", "loss"], name: str) -> Iterator[None]:
    """In the first micro-batch a parameter's gradient, or in the second the loss alone, is no number on one rank."""
    module = engine.engine.module
    if RANK != BROKEN_RANK:
        yield
        return
    calls = 0

    def gradient(value: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return value * torch.nan if calls == 1 else value

    def loss(_: nn.Module, inputs: Any, sums: Any) -> Any:
        nonlocal calls
        calls += 1
        return sums._replace(nll=sums.nll * torch.nan) if calls == 2 else sums

    parameters = dict(module.named_parameters()) | engine.apart.parameters
    handle = parameters[name].register_hook(gradient) if what == "gradient" else module.register_forward_hook(loss)
    with ExitStack() as after:
        after.callback(handle.remove)
        yield
    assert calls == 2


def skipped(name: str) -> dict[str, Any]:
    """A run with broken steps, one that was told to leave them out, and the oracle, told so too."""
    case, parameter = SKIPPED[name]
    config = case.config
    ways: dict[str, Any] = {}
    engine = None
    for way in ("broken", "told"):
        engine = deepspeed_engine(config)
        curve, unchanged = [], []
        for number in range(STEPS):
            before = bits(engine)
            with ExitStack() as stack:
                if way == "broken" and number in BAD:
                    stack.enter_context(broken(engine, BAD[number], parameter))
                curve.append(step(engine, config, number, skip=way == "told" and number in BAD))
            unchanged.append(bits(engine) == before)
        found = {"curve": curve, "unchanged": unchanged, "bits": bits(engine), "scalars": engine.scalars()}
        ways[way] = gathered(found, dist.group.WORLD)
    assert engine is not None
    oracle = against_oracle(case, engine) if case.precision == "fp32" else None
    return {**ways, "oracle": oracle, "flipped": [flipped(engine, *each) for each in FLIPPED.get(name, ())]}


def against_oracle(case: LayoutCase, engine: DeepSpeedEngine) -> dict[str, Any]:
    """The oracle's curve, and the largest difference of a weight from it on any rank."""
    config = replace(case.oracle, world=4, accumulation=2).config
    oracle = TorchEngine(build_decoder(config, DEVICE, torch.float32), config, DEVICE)
    curve = [step(oracle, config, number, skip=number in BAD) for number in range(STEPS)]
    whole = {piece.name: piece.views["fp32"] for piece in oracle.pieces()}
    differences = []
    for piece in engine.pieces():
        all_of_it = Box((0,) * len(piece.shape), piece.shape)
        wanted = whole[piece.name][slices(piece.box, all_of_it)]
        if wanted.numel():
            differences.append(float((piece.views["fp32"].to(DEVICE) - wanted).abs().max()))
    return {"curve": curve, "error": max(gathered(max(differences), dist.group.WORLD))}


def scaled(name: str) -> dict[str, Any]:
    """fp16's loss scaler after each of a sound step, one left out on request, and two that overflow though left out."""
    config = SCALED[name].config.model_copy(update={"precision": "fp16"})
    engine = deepspeed_engine(config)
    scaler = engine.engine.optimizer.loss_scaler
    found = []
    for number, (skip, scale) in enumerate(
        [(False, None), (True, None), (True, 2.0**60), (True, None), (False, 2.0**10)]
    ):
        scaler.cur_scale = scale or scaler.cur_scale
        before = bits(engine)
        loss, norm = step(engine, config, number, skip)
        state = copy.copy(vars(scaler))
        found.append({"unchanged": bits(engine) == before, "loss": loss, "norm": norm, "scaler": state})
        del state["dtype"]
    return {"steps": gathered(found, dist.group.WORLD), "counters": engine.scalars()["counters"]}


def flipped(engine: DeepSpeedEngine, name: str, kind: Literal["live", "master"]) -> dict[str, Any]:
    """What is found to differ: nothing; after one bit has changed on the last rank that holds some of it; after it has
    changed back."""
    module = engine.engine.module
    live = dict(module.named_parameters()) | dict(module.named_buffers()) | engine.apart.parameters
    masters = {piece.name: piece.views["fp32"] for piece in engine.pieces()}
    held = (live if kind == "live" else masters).get(name)
    last = max(rank for rank, holds in enumerate(gathered(held is not None, dist.group.WORLD)) if holds)
    found = [engine.differing_replicas()]
    for _ in range(2):
        if last == RANK and held is not None:
            flat = held.detach().view(-1)
            flat.view(torch.int16 if flat.element_size() == 2 else torch.int32)[-1] ^= 1
        found.append(engine.differing_replicas())
    assert gathered(found, dist.group.WORLD) == [found] * WORLD
    return {"name": name, "rank": last, "found": found}


CASES: dict[str, Callable[[], Any]] = {
    **{f"skipped {name}": partial(skipped, name) for name in SKIPPED},
    **{f"scaled {name}": partial(scaled, name) for name in SCALED},
}
