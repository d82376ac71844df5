"""One rank of `steppe bench memory`: `python -P -m launch.bench.memory_rank CONFIG.json STEPS FOLDER`.

Of the last step every allocation and release of torch's allocator is recorded and added up in the order of time, from
what tensors hold when it begins. That is what `torch.cuda.max_memory_allocated` counts on a GPU. The resident set is
reported beside it: besides tensors it has what the C library does not give back, gloo's buffers and what libraries
load, and lacks what was allocated and never touched.
"""

import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from data_pipeline.batch import Batch
from pretrain.config import RunConfig
from pretrain.device import detect, init_process_group, peak_memory_bytes, peak_resident_bytes
from pretrain.engine import agree, build_engine
from pretrain.layout import micro_batches
from pretrain.parallel_dims import ParallelDims
from pretrain.random_batch import random_batch

# Of the measured step. What another thread releases is seen late, by chance too late: that never lowers a peak.
REPEATS = 3


def main() -> None:
    """Train some steps on random tokens; leave `rank_N.json` in the folder."""
    # What DeepSpeed prints must not end up among the answers of `--json`.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    steps, folder = int(sys.argv[2]), Path(sys.argv[3])
    device = detect()
    init_process_group(device)
    dims = ParallelDims.of_this_rank(config)
    resident_before = peak_resident_bytes()
    engine = build_engine(config, device, dims)
    for step in range(steps - 1):
        agree(engine.train_step(_batches(config, dims, step), lr=config.optimizer.lr))
    peaks = []
    for _ in range(REPEATS):
        before = _live_storages()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            agree(engine.train_step(_batches(config, dims, steps - 1), lr=config.optimizer.lr))
        # A GPU's allocator keeps the count itself.
        peaks.append(peak_memory_bytes(device) if device.type == "cuda" else _peak_bytes(before, recorded))
    result = {
        "peak_bytes": min(peaks),
        "resident_bytes": peak_resident_bytes() - resident_before,
    }
    (folder / f"rank_{dist.get_rank()}.json").write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()


def _batches(config: RunConfig, dims: ParallelDims, step: int) -> list[Batch]:
    """Random tokens of this rank's micro-batches."""
    count = micro_batches(config, config.batch.global_batch_size, dims.data_world)
    first = (step * dims.data_world + dims.data_rank) * count
    return [random_batch(config, first + index) for index in range(count)]


def _live_storages() -> dict[int, int]:
    """Bytes of every tensor's memory by its address. Between steps nothing is held by autograd alone."""
    gc.collect()
    storages = (each.untyped_storage() for each in gc.get_objects() if isinstance(each, torch.Tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.device.type == "cpu"}


def _peak_bytes(sizes: dict[int, int], recorded: profile) -> int:
    """The most that was allocated at a time, beginning with `sizes` by address.

    What another thread releases, as gloo's do, is not recorded: an address that is given out again was released.
    """
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = _with_children(recorded.profiler.kineto_results.experimental_event_tree())
    allocations = (event for event in events if event.tag == _EventType.Allocation)
    sizes, held = dict(sizes), sum(sizes.values())
    peak = held
    for event in sorted(allocations, key=lambda event: event.start_time_ns):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        held -= sizes.pop(address, 0)
        if size > 0:
            sizes[address] = size
            held += size
        peak = max(peak, held)
    return peak


def _with_children(events: list[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _with_children(event.children)


if __name__ == "__main__":
    main()
