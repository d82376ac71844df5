"""One rank of a large layout, alone: `python -m tests.one_rank WORLD RANK RECIPE OVERRIDES...`.

Its process group is torch's fake one, in which every collective succeeds at once: groups, shards and memory are what
they would be, received values are not. Prints as JSON what building the engine cost.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain.device import detect, peak_memory_bytes
from pretrain.parallel_dims import ParallelDims
from pretrain.placement import placement
from pretrain.recipe import load_config


def main() -> None:
    world, rank = int(sys.argv[1]), int(sys.argv[2])
    config = load_config(Path(sys.argv[3]), sys.argv[4:])
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    from model.parameters import parameter_shapes
    from pretrain.engine_deepspeed import DeepSpeedEngine

    device, dims = detect(), ParallelDims.of_this_rank(config)
    before = peak_memory_bytes(device)
    engine = DeepSpeedEngine(config, device, dims)
    increase = peak_memory_bytes(device) - before
    shards = [placement(name, s, dims.layout, rank).box.numel for name, s in parameter_shapes(config.model).items()]
    owned = sum(piece.box.numel for piece in engine.pieces())
    print(json.dumps({"increase": increase, "owned": owned, "largest": max(shards), "shard": sum(shards)}))


if __name__ == "__main__":
    main()
