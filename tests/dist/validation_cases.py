"""Cases for test_validation.py: layouts that train two engines alike, of which one is validated at every step."""

import functools
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.checkpoint.save import save_checkpoint
from pretrain.config import RunConfig
from pretrain.device import detect, new_cpu_group
from pretrain.engine import Engine, agree, build_engine
from pretrain.parallel_dims import ParallelDims, gathered
from pretrain.state import TrainState
from pretrain.validation import Validation
from tests.held_out_folder import VOCABULARY
from tests.small_run import MODELS, rank_batches, small_config

STEPS = 2
# By number of ranks and name: what differs from the small config.
LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    2: {
        "zero0": ("parallel.zero_stage=0",),
        "zero1": ("parallel.zero_stage=1",),
        "zero2-experts": ("parallel.zero_stage=2", f"model.moe={MODELS['moebias']}"),
        "zero3-mask-tied": ("parallel.zero_stage=3", "model.document_mask=true", "model.tie_embeddings=true"),
        "tensor": ("parallel.tensor=2",),
        "sequence": ("parallel.sequence=2",),
        "expert-zero3": ("parallel={expert: 2, zero_stage: 3}", f"model.moe={MODELS['moe']}"),
    },
    4: {
        "tensor-zero3": ("parallel={tensor: 2, zero_stage: 3}",),
        "sequence-expert-zero3": (
            "parallel={sequence: 2, expert: 2, zero_stage: 3, activation_checkpointing: full}",
            f"model.moe={MODELS['moebias']}",
        ),
    },
}


def config_of(folder: str, *overrides: str) -> RunConfig:
    """The small model, validated on all of a data folder."""
    source = f"{{name: held-out, path: '{folder}'}}"
    return small_config(
        f"model.vocab_size={VOCABULARY}",
        "precision=fp32",
        f"evaluation={{every_steps: 1, windows: 1000, sources: [{source}]}}",
        *overrides,
    )


def validated(name: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """What is said of the model after some steps, its checkpoint, and whether training has noticed."""
    config = config_of(os.environ["HELD_OUT"], *overrides)
    dims = ParallelDims.of_this_rank(config)
    engine, undisturbed = (build_engine(config, detect(), dims) for _ in range(2))
    validation = Validation(config, dims, _host_group())
    same = True
    for step in range(STEPS):
        validation.scores(engine)
        same &= _step(engine, config, dims, step) == _step(undisturbed, config, dims, step)
    score = validation.scores(engine)["held-out"]
    pairs = zip(engine.pieces(), undisturbed.pieces(), strict=True)
    same &= all(torch.equal(ours.views[kind], theirs.views[kind]) for ours, theirs in pairs for kind in ours.views)
    folder = Path(os.environ["CASE_FOLDER"]) / name
    tokenizer = Path(os.environ["HELD_OUT"]) / "tokenizer.model"
    path = save_checkpoint(folder, engine, TrainState(step=STEPS), config, tokenizer, _host_group())
    told = [score.nats, score.tokens, score.bytes, score.documents]
    return {"score": told, "path": str(path), "same": all(gathered((same, told), dist.group.WORLD))}


def _step(engine: Engine, config: RunConfig, dims: ParallelDims, step: int) -> Any:
    """All that ranks know of a step."""
    return agree(engine.train_step(rank_batches(config, step, dims.data_rank, dims.data_world), lr=1e-3 * (step + 1)))


@functools.cache
def _host_group() -> dist.ProcessGroup:
    return new_cpu_group()


WORLD = dist.get_world_size() if dist.is_initialized() else 0  # where tests are collected there are no ranks
CASES = {name: functools.partial(validated, name, overrides) for name, overrides in LAYOUTS.get(WORLD, {}).items()}
