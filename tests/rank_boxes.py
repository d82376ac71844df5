"""What one rank of many holds, alone: `python -m tests.rank_boxes WORLD RANK RECIPE OVERRIDES...`.

Prints as JSON [name, offset, size, writer] of each piece of the engine's, in a process group that is torch's fake one.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain.device import detect
from pretrain.engine import build_engine
from pretrain.parallel_dims import ParallelDims
from pretrain.recipe import load_config


def main() -> None:
    world, rank = int(sys.argv[1]), int(sys.argv[2])
    config = load_config(Path(sys.argv[3]), sys.argv[4:])
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    pieces = build_engine(config, detect(), ParallelDims.of_this_rank(config)).pieces()
    print(json.dumps([[p.name, p.box.offset, p.box.size, p.writer] for p in pieces]))


if __name__ == "__main__":
    main()
