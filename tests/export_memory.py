"""`python -m tests.export_memory FOLDER`: what writing and comparing an export of 160 MB hold, as JSON.

To be run with MALLOC_MMAP_THRESHOLD_ small, so that what is let go of goes back to the system: the process's own memory
then is what it holds. Pages of mapped files do not count, which the system may take back at any time.
"""

import json
import math
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig
from model.parameters import parameter_shapes
from pretrain.hf import config_to_hf
from pretrain.hf_check import compare_logits
from pretrain.hf_export import plan_shards, write_shards

MODEL = {"hidden_size": 384, "num_layers": 16, "num_heads": 6, "ffn_size": 1536, "vocab_size": 4096}
SHARD_BYTES = 50_000_000


@contextmanager
def peak_of_memory() -> Iterator[list[int]]:
    """[bytes]: by how much this process's own memory grew at most, looked up every millisecond."""

    def own_bytes() -> int:
        return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024

    before, peak, over = own_bytes(), [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            peak[0] = max(peak[0], own_bytes() - before)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def main() -> None:
    folder = Path(sys.argv[1])
    model = ModelConfig.model_validate(MODEL)
    shapes = parameter_shapes(model)

    def made(name: str) -> Tensor:
        """A parameter, made when it is asked for; the same each time."""
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shapes[name], generator=generator).div_(20)

    shards = plan_shards(model, torch.float32, SHARD_BYTES)
    made("norm.weight")
    with peak_of_memory() as writing:
        write_shards(folder, shards, model, torch.float32, made)
    (folder / "config.json").write_text(json.dumps(config_to_hf(model)))
    import transformers.models.llama.modeling_llama  # noqa: F401  (its modules take memory, too)

    with peak_of_memory() as comparing:
        compared = compare_logits(folder, model, made, {1, 2}, memory_bytes=0)
    layer = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("layers.0."))
    report = {
        "mode": compared.mode,
        "largest_parameter": 4 * max(map(math.prod, shapes.values())),
        "layer": 4 * layer,
        "shards": [shard.nbytes for shard in shards],
        "writing": writing[0],
        "comparing": comparing[0],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
