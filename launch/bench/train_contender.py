"""One contender of `steppe bench train`: `python -P -m launch.bench.train_contender NAME JOB.json`.

Each trains from the same initial weights, where its model is the same, on the same batches, one micro-batch a step, and
reads its loss at every step as a training loop does.
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.batch import Batch
from launch.bench.bare_loop import bare_step
from launch.bench.contenders import CONTENDERS, keeps_memory
from launch.bench.dense_counterpart import dense_counterpart
from launch.bench.litgpt_peer import litgpt_step
from launch.bench.nanogpt_peer import nanogpt_step
from launch.bench.train_job import Job
from launch.bench.train_limit import seconds_of_parts
from launch.bench.train_overhead import operator_costs
from launch.bench.transformers_peer import transformers_step
from launch.bench.turns import Answers
from pretrain.affinity import BIND, bind
from pretrain.config import RunConfig
from pretrain.device import detect, gpu_addresses, init_process_group, peak_memory_bytes
from pretrain.engine import agree, build_engine
from pretrain.host_memory import keep_freed_memory
from pretrain.parallel_dims import ParallelDims
from pretrain.random_batch import random_batch

Step = Callable[[Batch], float]  # -> mean loss of the batch's targets before the step
Build = Callable[[Job, torch.device], tuple[Step, dict[str, Any]]]  # -> the step, and what is to be said of it


def steppe(job: Job, device: torch.device) -> tuple[Step, dict[str, Any]]:
    """The product: the DeepSpeed engine, and the loop's one status read."""
    engine = build_engine(job.config, device, ParallelDims.of_this_rank(job.config))
    return lambda batch: agree(engine.train_step([batch], job.config.optimizer.lr)).loss, {}


def steppe_compiled(job: Job, device: torch.device) -> tuple[Step, dict[str, Any]]:
    """The product, its blocks compiled."""
    parallel = job.config.parallel.model_copy(update={"compile": True})
    return steppe(job.model_copy(update={"config": job.config.model_copy(update={"parallel": parallel})}), device)


def steppe_dense(job: Job, device: torch.device) -> tuple[Step, dict[str, Any]]:
    """The product on a model without experts that has as many active parameters."""
    config = job.config.model_copy(update={"model": dense_counterpart(job.config.model)})
    return steppe(job.model_copy(update={"config": config}), device)


def transformers(pure_bf16: bool, compiled: bool) -> Build:
    """A variant of it."""
    return lambda job, device: transformers_step(job.config, device, pure_bf16, compiled)


def litgpt(pure_bf16: bool, compiled: bool) -> Build:
    """A variant of it."""
    return lambda job, device: litgpt_step(job.config, device, pure_bf16, compiled)


def nanogpt(compiled: bool) -> Build:
    """A variant of it."""

    def build(job: Job, device: torch.device) -> tuple[Step, dict[str, Any]]:
        assert job.nanogpt is not None
        return nanogpt_step(job.config, device, job.nanogpt, compiled)

    return build


class Turns:
    """A contender's answers."""

    def __init__(self, step: Step, config: RunConfig, device: torch.device) -> None:
        self._step, self._config, self._device = step, config, device
        self._batches = 0

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """{"steps": n, "unmeasured": m} -> seconds, losses and peak memory of n steps after m others; {"profile": n} ->
        costs of a step by operator; {"limit": true} -> seconds of a step's own operations by kind."""
        if "profile" in question:
            return {"operators": operator_costs(self._steps, question["profile"])}
        if "limit" in question:
            give_back_freed_memory()
            return {"limit": seconds_of_parts(self._config, self._device)}
        first = self._steps(question.get("unmeasured", 0))
        started = time.perf_counter()
        losses = self._steps(question["steps"])
        seconds = time.perf_counter() - started
        # Who keeps what it has freed would have the others' share of the machine's memory while they take their turns.
        give_back_freed_memory()
        return {"seconds": seconds, "losses": first + losses, "peak_memory_bytes": peak_memory_bytes(self._device)}

    def _steps(self, count: int) -> list[float]:
        """Some optimizer steps; their losses. Of several ranks each has batches of its own."""
        rank, world = dist.get_rank(), dist.get_world_size()
        numbers = range(self._batches, self._batches + count)
        self._batches += count
        return [self._step(random_batch(self._config, number * world + rank)) for number in numbers]


def give_back_freed_memory() -> None:
    """Return to the system what the C library holds and nobody uses, where it can (glibc)."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def main() -> None:
    """Answer as `Turns` does until stdin ends."""
    answers = Answers()
    name, job = sys.argv[1], Job.model_validate_json(Path(sys.argv[2]).read_text(encoding="utf-8"))
    if keeps_memory(name, job.keep_memory):
        keep_freed_memory()
    device = detect()
    if BIND in os.environ:
        ranks = int(os.environ["LOCAL_WORLD_SIZE"])
        bind(int(os.environ["LOCAL_RANK"]), ranks, gpu_addresses(ranks))
    init_process_group(device)
    step, about = BUILDERS[name](job, device)
    answers.say(threads=torch.get_num_threads(), torch=torch.__version__, about=about)
    turns = Turns(step, job.config, device)
    for question in answers.questions():
        answers.say(**turns.answer(question))
    dist.destroy_process_group()


BUILDERS: dict[str, Build] = {
    "steppe": steppe,
    "steppe-compiled": steppe_compiled,
    "bare": lambda job, device: (bare_step(job.config, device), {}),
    "steppe-dense": steppe_dense,
    "transformers-mixed": transformers(pure_bf16=False, compiled=False),
    "transformers-bf16": transformers(pure_bf16=True, compiled=False),
    "transformers-mixed-compiled": transformers(pure_bf16=False, compiled=True),
    "transformers-bf16-compiled": transformers(pure_bf16=True, compiled=True),
    "litgpt-mixed": litgpt(pure_bf16=False, compiled=False),
    "litgpt-bf16": litgpt(pure_bf16=True, compiled=False),
    "litgpt-mixed-compiled": litgpt(pure_bf16=False, compiled=True),
    "litgpt-bf16-compiled": litgpt(pure_bf16=True, compiled=True),
    "nanogpt-mixed": nanogpt(compiled=False),
    "nanogpt-mixed-compiled": nanogpt(compiled=True),
}
assert BUILDERS.keys() == CONTENDERS.keys()


if __name__ == "__main__":
    main()
