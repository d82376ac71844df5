"""Where this rank stands in the layout, with the process groups of its axes; and what all ranks say."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from pretrain.config import RunConfig
from pretrain.device import collective_timeout
from pretrain.layout import AXES, Axis, Layout


@dataclass(frozen=True)
class ParallelDims:
    """This rank's place in a layout. A group is None where it would be of one rank: there is nobody to talk to.

    The loader is told only (data_rank, data_world): whatever else a layout does, it does to the same samples.
    """

    layout: Layout
    rank: int
    groups: Mapping[Axis, dist.ProcessGroup | None]

    @classmethod
    def of_this_rank(cls, config: RunConfig) -> "ParallelDims":
        """Make the groups of this rank's axes. Collective; one rank without a process group is a layout too.

        Every rank makes one group an axis, of the same size and in the same order: NCCL splits a communicator, which
        all of its ranks must enter together.

        Raises ValueError if the ranks there are cannot be laid out as the config says.
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        layout = Layout.of(config, world)
        made: dict[range, dist.ProcessGroup | None] = {range(rank, rank + 1): None}
        if world > 1:
            made[range(world)] = dist.group.WORLD
        for axis in AXES:
            ranks = layout.group_of(rank, axis)
            if ranks not in made:  # equal ranges are equal groups; only the members take part in making one
                made[ranks] = dist.new_group(list(ranks), collective_timeout(), use_local_synchronization=True)
        return cls(layout, rank, {axis: made[layout.group_of(rank, axis)] for axis in AXES})

    def all_reduce(self, tensor: Tensor, axis: Axis) -> None:
        """Sum over an axis, in place; nothing where this rank is alone on it, for which torch would take the world."""
        if self.groups[axis] is not None:
            dist.all_reduce(tensor, group=self.groups[axis])

    @property
    def data_rank(self) -> int:
        """Which of the data-parallel shares of a global batch is this rank's."""
        return self.layout.coordinates(self.rank)[0]

    @property
    def data_world(self) -> int:
        return self.layout.data

    def index(self, axis: Axis) -> int:
        """This rank's place in its group of an axis."""
        return self.layout.group_of(self.rank, axis).index(self.rank)

    def size(self, axis: Axis) -> int:
        """How many ranks its group of an axis has."""
        return len(self.layout.group_of(self.rank, axis))


def gathered(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank; of a single rank (`group` is None) its own."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gathered_by_first(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's value, in the order of ranks, on the first rank; nothing on the others."""
    if group is None:
        return [value]
    first = dist.get_rank(group) == 0
    values: list[Any] | None = [None] * dist.get_world_size(group) if first else None
    dist.gather_object(value, values, group=group, group_dst=0)
    return values or []


def first_of(act: Callable[[], Any], group: dist.ProcessGroup | None) -> Any:
    """What `act` returns on the first rank, which alone calls it, on every rank.

    Raises on every rank the ValueError or OSError that it raises there.
    """
    if group is None:
        return act()
    outcome: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            outcome[0] = act()
        except (ValueError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
