"""Cases for test_step_counts.py: what one optimizer step of the product asks of the machine, once it has settled."""

import functools
from typing import Any

import torch

from model import blockwise_attention
from pretrain.device import detect
from pretrain.engine import agree, build_engine
from pretrain.parallel_dims import ParallelDims
from tests.small_run import rank_batches, small_config
from tests.step_counts import step_counts

# DeepSpeed's buffers would hide the model's own memory.
BUCKET = "deepspeed={zero_optimization: {reduce_bucket_size: 100_000}}"
WARM_UP = 2  # the optimizer's state is made in the first step


def counts(stage: int, tiled: bool) -> dict[str, Any]:
    """Of the small model in bf16: 2 blocks, 8 sequences of a global batch in micro-batches of 2.

    tiled: as on a processor that multiplies tiles, whatever this one does.
    """
    blockwise_attention.TILED_DTYPES = frozenset({torch.bfloat16} if tiled else ())
    config = small_config("precision=bf16", f"parallel.zero_stage={stage}", BUCKET)
    dims = ParallelDims.of_this_rank(config)
    engine = build_engine(config, detect(), dims)
    batches = rank_batches(config, 0, dims.data_rank, dims.data_world)

    def step() -> None:
        agree(engine.train_step(batches, lr=1e-3))

    for _ in range(WARM_UP):
        step()
    return step_counts(step)


CASES = {
    "zero1": functools.partial(counts, 1, tiled=False),
    "zero2": functools.partial(counts, 2, tiled=False),
    "tiled": functools.partial(counts, 1, tiled=True),
}
