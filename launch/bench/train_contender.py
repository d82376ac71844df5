"""One contender of `steppe bench train`: `python -P -m launch.bench.train_contender NAME CONFIG.json`.

Each trains from the same initial weights (but a dense model, which has its own) on the same batches, one micro-batch a
step, and reads its loss at every step as a training loop does.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_pipeline.batch import Batch
from launch.bench.contenders import CONTENDERS
from launch.bench.dense_counterpart import dense_counterpart
from launch.bench.transformers_peer import transformers_step
from launch.bench.turns import Answers
from pretrain.config import RunConfig
from pretrain.device import detect, init_process_group, peak_memory_bytes
from pretrain.engine import agree, build_engine
from pretrain.parallel_dims import ParallelDims
from pretrain.random_batch import random_batch

Step = Callable[[Batch], float]  # -> mean loss of the batch's targets before the step
Build = Callable[[RunConfig, torch.device], tuple[Step, dict[str, Any]]]  # -> the step, and what is to be said of it


def steppe(config: RunConfig, device: torch.device) -> tuple[Step, dict[str, Any]]:
    """The product: the DeepSpeed engine, and the loop's one status read."""
    engine = build_engine(config, device, ParallelDims.of_this_rank(config))
    return lambda batch: agree(engine.train_step([batch], config.optimizer.lr)).loss, {}


def steppe_dense(config: RunConfig, device: torch.device) -> tuple[Step, dict[str, Any]]:
    """The product on a model without experts that has as many active parameters."""
    return steppe(config.model_copy(update={"model": dense_counterpart(config.model)}), device)


def main() -> None:
    """Answer {"steps": n} with {"seconds": .., "losses": [..], "peak_memory_bytes": ..} until stdin ends."""
    answers = Answers()
    name, config = sys.argv[1], RunConfig.model_validate_json(Path(sys.argv[2]).read_text(encoding="utf-8"))
    device = detect()
    init_process_group(device)
    step, about = BUILDERS[name](config, device)
    done = 0
    answers.say(threads=torch.get_num_threads(), torch=torch.__version__, about=about)
    for question in answers.questions():
        steps = question["steps"]
        started = time.perf_counter()
        losses = [step(random_batch(config, number)) for number in range(done, done + steps)]
        seconds = time.perf_counter() - started
        done += steps
        answers.say(seconds=seconds, losses=losses, peak_memory_bytes=peak_memory_bytes(device))
    torch.distributed.destroy_process_group()


BUILDERS: dict[str, Build] = {
    "steppe": steppe,
    "steppe-dense": steppe_dense,
    "transformers": lambda config, device: transformers_step(config, device, pure_bf16=False),
    "transformers-bf16": lambda config, device: transformers_step(config, device, pure_bf16=True),
}
assert BUILDERS.keys() == CONTENDERS.keys()


if __name__ == "__main__":
    main()
