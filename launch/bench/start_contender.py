"""The process of `steppe bench start --part resume`: `python -P -m launch.bench.start_contender CONFIG.json FOLDER`.

It saves a checkpoint, and answers {"name": "read"} and {"name": "load"} with the seconds that each took.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash

from launch.bench.turns import Answers
from pretrain.checkpoint.index import rank_file_name
from pretrain.checkpoint.load import load_checkpoint
from pretrain.checkpoint.rank_file import READ_BYTES
from pretrain.checkpoint.save import save_checkpoint
from pretrain.config import RunConfig
from pretrain.device import detect, init_process_group
from pretrain.parallel_dims import ParallelDims
from pretrain.state import TrainState


def read(path: Path, memory: memoryview) -> None:
    """All of a file into memory as long as it, hashed as it comes."""
    digest, at, handle = xxhash.xxh3_64(), 0, os.open(path, os.O_RDONLY)
    try:
        while at < len(memory):
            count = os.preadv(handle, [memory[at : at + READ_BYTES]], at)
            digest.update(memory[at : at + count])
            at += count
    finally:
        os.close(handle)


def main() -> None:
    """Build, save, then answer until nobody asks."""
    answers = Answers()
    # It speaks on stdout when imported.
    from pretrain.engine_deepspeed import DeepSpeedEngine

    config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    device = detect()
    init_process_group(device)
    engine = DeepSpeedEngine(config, device, ParallelDims.of_this_rank(config))
    checkpoint = save_checkpoint(Path(sys.argv[2]) / "saved", engine, TrainState(step=1), config, None, None)
    file = checkpoint / rank_file_name(0)
    memory = memoryview(bytearray(file.stat().st_size))
    acts = {"read": lambda: read(file, memory), "load": lambda: load_checkpoint(checkpoint, engine)}
    answers.say(state_bytes=len(memory), threads=torch.get_num_threads(), torch=torch.__version__)
    for question in answers.questions():
        began = time.perf_counter()
        acts[question["name"]]()
        answers.say(seconds=time.perf_counter() - began)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
