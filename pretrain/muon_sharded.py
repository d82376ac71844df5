"""Muon's orthogonalisation where matrices lie in pieces on many ranks, whatever the layout cut them into.

Each matrix is put together on one rank, orthogonalised there, and sent back to all that hold a part: the work is spread
out, never repeated, and a matrix's result does not depend on how it was cut. Updates travel in the dtype they are
orthogonalised in, so nothing is rounded that would not be. What a rank sends and receives is a small part of what
ZeRO's gathering of the weights moves.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.boxes import Box, Index, slices
from pretrain.muon import Direction, newton_schulz, update_scale
from pretrain.parallel_dims import gathered

# Matrices are exchanged in rounds, which bounds the memory: in each a rank puts together so many elements, and at most
# one matrix more.
ROUND_ELEMENTS = 2**26

Matrix = tuple[str, int]  # a parameter's logical name, and which matrix of its stack


@dataclass(frozen=True)
class HeldBox:
    """One box of a parameter of logical shape (m, n) or (E, m, n); it fills a run of one of this rank's tensors."""

    name: str
    shape: Index
    box: Box
    start: int


@dataclass(frozen=True)
class Part:
    """A box of one matrix (m, n), which fills a run of a rank's tensor of that index."""

    matrix: Matrix
    shape: Index
    box: Box
    tensor: int
    start: int

    @property
    def run(self) -> slice:
        return slice(self.start, self.start + self.box.numel)


@dataclass(frozen=True)
class Round:
    """One exchange as one rank sees it. Each list is by the rank at the other end.

    gives: parts of this rank, to the ranks that put their matrices together.
    takes: parts of the matrices that this rank puts together, from the ranks that hold them.
    returns: all parts and copies of parts of those matrices, to the ranks that hold them.
    regains: all parts of this rank, from the ranks that put their matrices together.
    """

    gives: list[list[Part]]
    takes: list[list[Part]]
    returns: list[list[Part]]
    regains: list[list[Part]]


def parts_of(boxes: Sequence[HeldBox], tensor: int) -> Iterator[Part]:
    """Boxes in the tensor of that index, cut into matrices: each of a stack is one by itself."""
    for held in boxes:
        shape, box, start = held.shape, held.box, held.start
        first, count = (box.offset[0], box.size[0]) if len(shape) == 3 else (0, 1)
        part = Box(box.offset[-2:], box.size[-2:])
        for index in range(count):
            yield Part((held.name, first + index), shape[-2:], part, tensor, start + index * part.numel)


def owners_and_rounds(shapes: Mapping[Matrix, Index], world: int, capacity: int) -> dict[Matrix, tuple[int, int]]:
    """The rank that puts a matrix together and the round in which it does, by matrix.

    Spread by the work of Newton-Schulz: the dearest matrix first, each to the rank that has least to do so far.
    """

    def work(matrix: Matrix) -> int:
        short, long = sorted(shapes[matrix])
        return short * short * (2 * long + short)

    loads = [(0, rank) for rank in range(world)]
    elements = [0] * world
    plan = {}
    for matrix in sorted(shapes, key=lambda matrix: (-work(matrix), shapes[matrix], matrix)):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + work(matrix), rank))
        plan[matrix] = rank, elements[rank] // capacity
        elements[rank] += math.prod(shapes[matrix])
    return plan


def planned(parts_of_ranks: Sequence[Sequence[Part]], rank: int, capacity: int = ROUND_ELEMENTS) -> list[Round]:
    """A rank's rounds, from the parts of all ranks, of which any two of a matrix are disjoint or copies."""
    world = len(parts_of_ranks)
    shapes = {part.matrix: part.shape for parts in parts_of_ranks for part in parts}
    holders: dict[Matrix, dict[Box, list[int]]] = defaultdict(lambda: defaultdict(list))
    for holder, parts in enumerate(parts_of_ranks):
        for part in parts:
            holders[part.matrix][part.box].append(holder)
    for matrix, shape in shapes.items():
        held = sum(box.numel for box in holders[matrix])
        assert held == math.prod(shape), f"{matrix}: ranks hold {held} elements of {shape}"
    plan = owners_and_rounds(shapes, world, capacity)
    count = 1 + max(index for _, index in plan.values())

    def empty() -> list[list[Part]]:
        return [[] for _ in range(world)]

    rounds = [Round(empty(), empty(), empty(), empty()) for _ in range(count)]
    for holder, parts in enumerate(parts_of_ranks):
        for part in parts:
            owner, index = plan[part.matrix]
            copies = holders[part.matrix][part.box]
            gives = holder == (owner if owner in copies else copies[0])
            if rank == holder:
                rounds[index].regains[owner].append(part)
                if gives:
                    rounds[index].gives[owner].append(part)
            if rank == owner:
                rounds[index].returns[holder].append(part)
                if gives:
                    rounds[index].takes[holder].append(part)
    return rounds


@dataclass
class ShardedOrthogonalizer:
    """An `Orthogonalizer` of parameters of which this rank holds parts: flat shares under ZeRO, shards, copies.

    boxes: what the optimizer's parameters hold, in any order; padding is in none, and what is not Muon's is unused.
    group: the ranks over which the matrices are spread, or None for one rank alone. A call is collective over it, and
    all ranks call with corresponding groups of parameters in the same order.
    """

    boxes: Mapping[Tensor, Sequence[HeldBox]]
    group: dist.ProcessGroup | None
    rounds: dict[Tensor, list[Round]] = field(default_factory=dict, init=False)

    def __call__(self, parameters: Sequence[Tensor], updates: Sequence[Tensor]) -> Iterator[Direction]:
        """The directions of this rank's parts, round by round."""
        flat_updates = [update.view(-1) for update in updates]
        for each in self._rounds(parameters):
            given = [[flat_updates[part.tensor][part.run] for part in parts] for parts in each.gives]
            matrices = self._orthogonalised(self._exchanged(given, each.takes, flat_updates[0]))
            returned = [
                [matrices[p.matrix][slices(p.box, whole_box(p.shape))] for p in parts] for parts in each.returns
            ]
            for part, values in self._exchanged(returned, each.regains, flat_updates[0]):
                yield Direction(parameters[part.tensor].view(-1)[part.run], values, update_scale(part.shape))

    def _rounds(self, parameters: Sequence[Tensor]) -> list[Round]:
        """The plan for a group of parameters, made together when it is first stepped."""
        if parameters[0] not in self.rounds:
            boxes = [self.boxes.get(tensor, ()) for tensor in parameters]  # none: all of it is padding
            own = [part for index, held in enumerate(boxes) for part in parts_of(held, index)]
            rank = 0 if self.group is None else dist.get_rank(self.group)
            self.rounds[parameters[0]] = planned(gathered(own, self.group), rank)
        return self.rounds[parameters[0]]

    def _orthogonalised(self, parts: Sequence[tuple[Part, Tensor]]) -> dict[Matrix, Tensor]:
        """Matrices put together from their parts and orthogonalised, those of one shape at once."""
        of_shape: dict[Index, dict[Matrix, list[tuple[Part, Tensor]]]] = defaultdict(lambda: defaultdict(list))
        for part, values in parts:
            of_shape[part.shape][part.matrix].append((part, values))
        done: dict[Matrix, Tensor] = {}
        for shape, matrices in of_shape.items():
            stack = parts[0][1].new_empty(len(matrices), *shape)
            for matrix, pieces in zip(stack, matrices.values(), strict=True):
                for part, values in pieces:
                    matrix[slices(part.box, whole_box(shape))] = values.view(part.box.size)
            done |= zip(matrices, newton_schulz(stack), strict=True)
        return done

    def _exchanged(self, given: list[list[Tensor]], taken: list[list[Part]], like: Tensor) -> list[tuple[Part, Tensor]]:
        """Give each rank its tensors and take from each its parts, flat: one all-to-all."""
        outgoing = torch.cat([like.new_empty(0), *(tensor.reshape(-1) for tensors in given for tensor in tensors)])
        incoming = outgoing
        if self.group is not None:
            given_sizes = [sum(tensor.numel() for tensor in tensors) for tensors in given]
            taken_sizes = [sum(part.box.numel for part in parts) for parts in taken]
            incoming = like.new_empty(sum(taken_sizes))
            dist.all_to_all_single(incoming, outgoing, taken_sizes, given_sizes, group=self.group)
        arrived = [part for parts in taken for part in parts]
        return list(zip(arrived, incoming.split([part.box.numel for part in arrived]), strict=True))


def whole_box(shape: Index) -> Box:
    """The box that is all of a tensor."""
    return Box((0,) * len(shape), shape)
