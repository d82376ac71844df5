"""What a step asks of the machine, as counts: they are the same on every machine, and a slip shows in them at once."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.bench.memory_rank import REPEATS, LiveBytes

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
# What takes the time of a step, or moves its memory: products, copies, and memory that is filled.
COSTLY = ("mm", "addmm", "bmm", "baddbmm", "copy_", "_to_copy", "clone", "cat", "fill_", "zero_")


@contextmanager
def host_reads() -> Iterator[Counter[str]]:
    """Counts every way in which the host can read a tensor's value; each makes it wait for a GPU."""
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            original = getattr(torch.Tensor, name)

            def counted(self: torch.Tensor, *args: object, name: str = name, original: Any = original) -> object:
                counts[name] += 1
                return original(self, *args)

            patch.setattr(torch.Tensor, name, counted)
        yield counts


class Operators(TorchDispatchMode):
    """Counts the operators that reach a device, views among them, and the collectives with their bytes.

    collectives: kind -> [calls, bytes of the whole tensor: of what an all-gather makes, of what a reduction takes].
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.collectives: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            sizes = [each.nbytes for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
            of_kind = self.collectives.setdefault(name.strip("_"), [0, 0])
            of_kind[0] += 1
            of_kind[1] += max(sizes, default=0)
        else:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def step_counts(step: Callable[[], object]) -> dict[str, Any]:
    """What `step` asks of the machine each time it is called; as JSON values. Collective if the step is."""
    before = counters["stats"]["unique_graphs"]
    with host_reads() as reads:
        step()
    with Operators() as operators:
        step()
    peaks = []
    for _ in range(REPEATS):
        with LiveBytes() as live:
            step()
        peaks.append(live.peak)
    return {
        "host_reads": dict(reads),
        "collectives": operators.collectives,
        "compilations": counters["stats"]["unique_graphs"] - before,
        "operators": operators.calls.total(),
        "costly": {name: operators.calls[name] for name in COSTLY if operators.calls[name]},
        "reads_in_operators": operators.calls["_local_scalar_dense"],
        "peak_bytes": min(peaks),
    }
