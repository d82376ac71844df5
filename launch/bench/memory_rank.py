"""One rank of `steppe bench memory`: `python -P -m launch.bench.memory_rank CONFIG.json STEPS FOLDER`.

After every operation of the last step what all live tensors hold is added up, the peak of which is what
`torch.cuda.max_memory_allocated` counts on a GPU but for workspaces inside an operation. The resident set is reported
beside it: besides tensors it has what the C library does not give back, gloo's buffers and what libraries load, and
lacks what was allocated and never touched.
"""

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.batch import Batch
from pretrain.config import RunConfig
from pretrain.device import detect, init_process_group, peak_memory_bytes, peak_resident_bytes
from pretrain.engine import agree, build_engine
from pretrain.layout import micro_batches
from pretrain.parallel_dims import ParallelDims
from pretrain.random_batch import random_batch

# Of the measured step: gloo's threads let go of a tensor a moment after its collective, which can only raise a peak.
REPEATS = 3


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors held at a time, looked at after each operation, whichever thread releases them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        # Between steps nothing is held by autograd alone.
        gc.collect()
        self._count([each for each in gc.get_objects() if isinstance(each, torch.Tensor)])

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._count([each for each in tree_leaves(result) if isinstance(each, torch.Tensor)])
        return result

    def _count(self, tensors: list[torch.Tensor]) -> None:
        for storage in (each.untyped_storage() for each in tensors if each.device.type == "cpu"):
            self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._storages = {key: each for key, each in self._storages.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))


def main() -> None:
    """Train some steps on random tokens; leave `rank_N.json` in the folder."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to save
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
        with LiveBytes() as live:
            agree(engine.train_step(_batches(config, dims, steps - 1), lr=config.optimizer.lr))
        # A GPU's allocator keeps the count itself.
        peaks.append(peak_memory_bytes(device) if device.type == "cuda" else live.peak)
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


if __name__ == "__main__":
    main()
