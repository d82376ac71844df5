"""Cases for test_async.py: what is saved while the next step is made, on a device from which copies are slow."""

import gc
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pretrain.checkpoint.folder import checkpoint_path
from pretrain.checkpoint.index import read_index
from pretrain.checkpoint.save import CheckpointSaver, Saved
from pretrain.config import RunConfig
from pretrain.device import CopyStream, detect, new_cpu_group
from pretrain.engine import build_engine
from pretrain.parallel_dims import ParallelDims
from pretrain.schedule import learning_rate
from tests.faults.states import state_of
from tests.small_run import rank_batches, small_config

SAVED, STEPS = 2, 4
COPY_SECONDS = 3.0  # in which a step is made, on a busy machine
ZERO_1_BF16 = ("parallel.zero_stage=1", "precision=bf16")
ZERO_2_FP32 = ("parallel.zero_stage=2", "precision=fp32")


def case(name: str, settings: tuple[str, ...], guarded: bool) -> dict[str, Any]:
    """Digests of a checkpoint that is saved while training goes on, and of its blocking twin."""
    folder = Path(os.environ["CASE_FOLDER"]) / name
    with slow_copies():
        saved = trained(folder / "asynchronous", small_config(*settings), guarded)
    blocking = small_config(*settings, "checkpoint.asynchronous=false")
    trained(folder / "blocking", blocking, guarded)
    gc.collect()
    return {
        "asynchronous": digest(folder / "asynchronous"),
        "blocking": digest(folder / "blocking"),
        "waited_seconds": saved.stall_seconds,
    }


def trained(folder: Path, config: RunConfig, guarded: bool) -> Saved:
    """Some steps, with a save after `SAVED` of them; how it went."""
    dims = ParallelDims.of_this_rank(config)
    engine = build_engine(config, detect(), dims)
    reports: list[Saved] = []
    saver = CheckpointSaver(folder, engine, config, None, group(), report=reports.append)
    before_update = saver.staged if guarded else lambda: None
    for step in range(STEPS):
        state = state_of(step)
        batches = rank_batches(config, step, dims.data_rank, dims.data_world)
        engine.train_step(batches, learning_rate(config, state.step, state.tokens, 1), before_update)
        if step + 1 == SAVED:
            saver.start(state_of(SAVED))
    saver.wait()
    return reports[0]


@contextmanager
def slow_copies() -> Iterator[None]:
    """Copies from a device take their time to begin."""
    copying = CopyStream.copying

    @contextmanager
    def slow(stream: CopyStream) -> Iterator[None]:
        time.sleep(COPY_SECONDS)
        with copying(stream):
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CopyStream, "copying", slow)
        yield


def digest(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds: the hash of each rank's file, and what is not in them."""
    checkpoint = checkpoint_path(folder, SAVED)
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.glob("rank-*")}
    index = read_index(checkpoint)
    return {"files": files, "trainer": index.trainer, "engine": index.engine}


@cache
def group() -> dist.ProcessGroup:
    """Of the saves, as the training loop has it."""
    return new_cpu_group()


CASES: dict[str, Callable[[], Any]] = {
    "zero 1 in bf16": partial(case, "zero1", ZERO_1_BF16, True),
    "zero 2 in fp32": partial(case, "zero2", ZERO_2_FP32, True),
    "unguarded": partial(case, "unguarded", ZERO_2_FP32, False),
}
