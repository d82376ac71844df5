"""Where this rank stands in the layout: degrees and coordinates; and what all ranks say."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of each axis and this rank's place on it.

    The loader is told only (data_rank, data_world): whatever else a layout does, it does to the same samples.
    """

    data_rank: int
    data_world: int

    @classmethod
    def of_this_rank(cls) -> "ParallelDims":
        """From the process group, which must exist; one rank without a group is a layout too."""
        if not dist.is_initialized():
            return cls(data_rank=0, data_world=1)
        return cls(data_rank=dist.get_rank(), data_world=dist.get_world_size())


def gathered(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank; of a single rank (`group` is None) its own."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
