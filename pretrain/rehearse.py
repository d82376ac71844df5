"""A step at a layout of any size, in one process: `python -P -m pretrain.rehearse CONFIG WORLD RANK...`.

The process is one rank after another of a group whose other ranks do not exist: a collective returns at once, with the
rank's own values where those of others belong. So what is computed means nothing, but groups are made, parameters
placed, buffers partitioned and exchanged as on the real ranks, and what does not divide fails here as it would there.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.config import RunConfig
from pretrain.deepspeed_zero import without_others
from pretrain.device import detect
from pretrain.engine import agree, build_engine
from pretrain.layout import batch_sizes, micro_batches
from pretrain.parallel_dims import ParallelDims
from pretrain.random_batch import random_batch
from pretrain.recipe import load_config


def step_as(rank: int, world: int, config: RunConfig) -> int:
    """Build this rank's part of the run among `world` ranks, and make one step and one validation forward with it.
    Returns how many elements of parameters (and buffers) the rank updates.

    Raises whatever is wrong with it. The process must be in no process group, and is in none afterwards.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        dims = ParallelDims.of_this_rank(config)
        engine = build_engine(config, detect(), dims)
        count = micro_batches(config, batch_sizes(config)[0], dims.data_world)
        batches = [random_batch(config, index) for index in range(count)]
        with without_others():
            agree(engine.train_step(batches, config.optimizer.lr))
            engine.validation_nll(batches[0])
        return sum(piece.box.numel for piece in engine.pieces())
    finally:
        dist.destroy_process_group()


def main() -> None:
    """A line for each rank; one that fails ends the process with its traceback."""
    path, world, *ranks = sys.argv[1:]
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    torch.set_num_threads(1)
    config = load_config(Path(path))
    for rank in ranks:
        print(f"rank {rank} of {world} made its step: {step_as(int(rank), int(world), config)} elements are its own")


if __name__ == "__main__":
    main()
