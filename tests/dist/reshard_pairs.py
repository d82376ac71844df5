"""The layouts that test_reshard.py trains and saves, and which of them loads from which others.

A change is a value of an axis that becomes another. Of all ordered pairs of a family's layouts as few are chosen as a
greedy covering needs so that every change between two values that the family has is in some pair. A pair is of the same
mathematics at both ends, but for precision: whoever loads goes on as the one who saved would have.
"""

import collections
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from pretrain.config import RunConfig
from tests.small_run import MODELS, small_config

STEPS, SAVED_AFTER = 5, 3  # of every layout; of an odd number of steps, for the routers' biases go up or down in each

# Sizes that 4 ranks cannot share evenly, here and of the norms of heads of 6: ZeRO's shares end within rows, and the
# last is padded.
UNEVEN = "model={hidden_size: 30, head_size: 6, ffn_size: 44}"
FAMILIES = {
    "dense": (UNEVEN,),
    "muon": (UNEVEN, "optimizer.name=muon"),
    "moe": (f"model={{head_size: 6, qk_norm: true, moe: {MODELS['moe']}}}",),
    "moebias": (f"model={{head_size: 6, qk_norm: true, tie_embeddings: true, moe: {MODELS['moebias']}}}",),
}


@dataclass(frozen=True)
class SavedLayout:
    """A layout that is trained, saved and loaded. Its fields but the first are the axes along which it may change."""

    family: Literal["dense", "muon", "moe", "moebias"]
    world: Literal[1, 2, 4]
    zero_stage: Literal[0, 1, 2, 3]
    tensor: Literal[1, 2, 4] = 1
    sequence: Literal[1, 2, 4] = 1
    expert: Literal[1, 2, 4] = 1
    offload: Literal["none", "optimizer", "all"] = "none"
    micro_batch_size: Literal[1, 2, 4] = 2
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    @property
    def name(self) -> str:
        """Readable, unique, and usable as a folder's name."""
        degrees = {"tp": self.tensor, "sp": self.sequence, "ep": self.expert}
        words = [
            f"{self.family}-w{self.world}-zero{self.zero_stage}",
            *(f"{word}{degree}" for word, degree in degrees.items() if degree > 1),
            *([f"offload_{self.offload}"] if self.offload != "none" else []),
            f"mb{self.micro_batch_size}",
            self.precision,
        ]
        return "-".join(words)

    def config(self, *overrides: str) -> RunConfig:
        """The run. Raises ValueError if no number of ranks can do it."""
        parallel = {
            "zero_stage": self.zero_stage,
            "tensor": self.tensor,
            "sequence": self.sequence,
            "expert": self.expert,
            "offload_optimizer": "none" if self.offload == "none" else "cpu",
            "offload_parameters": "cpu" if self.offload == "all" else "none",
        }
        return small_config(
            *FAMILIES[self.family],
            f"parallel={parallel}",
            f"batch.micro_batch_size={self.micro_batch_size}",
            f"precision={self.precision}",
            "optimizer.eps=1e-6",  # above rounding's noise, whose sign would be an update (see layouts.py)
            *overrides,
        )


AXES = tuple(field.name for field in fields(SavedLayout) if field.name != "family")


class Change(NamedTuple):
    """One axis of a layout, from one value to another."""

    axis: str
    old: Any
    new: Any


class Load(NamedTuple):
    """`target` goes on from the checkpoint of `source`."""

    source: SavedLayout
    target: SavedLayout

    @property
    def name(self) -> str:
        return f"{self.target.name} from {self.source.name}"

    @property
    def changes(self) -> set[Change]:
        """What is another at the target."""
        values = ((axis, getattr(self.source, axis), getattr(self.target, axis)) for axis in AXES)
        return {Change(axis, old, new) for axis, old, new in values if old != new}

    @property
    def brings(self) -> set[Any]:
        """What a covering counts: the changes; a precision that stays while others change; each end in its part."""
        precision = Change("precision", self.source.precision, self.target.precision)
        return {*self.changes, precision, ("source", self.source), ("target", self.target)}


LAYOUTS = (
    SavedLayout("dense", 1, 0, micro_batch_size=4),
    SavedLayout("dense", 1, 2, offload="optimizer"),
    SavedLayout("dense", 1, 3, offload="all", micro_batch_size=1),
    SavedLayout("dense", 1, 1, precision="bf16"),
    SavedLayout("dense", 2, 1, micro_batch_size=4),
    SavedLayout("dense", 2, 0, tensor=2),
    SavedLayout("dense", 2, 2, sequence=2, precision="bf16"),
    SavedLayout("dense", 2, 3, offload="optimizer", micro_batch_size=1),
    SavedLayout("dense", 2, 3, tensor=2, precision="fp16"),
    SavedLayout("dense", 4, 3),
    SavedLayout("dense", 4, 1, tensor=2, offload="optimizer", micro_batch_size=1),
    SavedLayout("dense", 4, 2, tensor=4, micro_batch_size=4),
    SavedLayout("dense", 4, 1, sequence=4),
    SavedLayout("dense", 4, 0, tensor=2, sequence=2),
    SavedLayout("dense", 4, 3, sequence=2, offload="all", precision="bf16"),
    SavedLayout("dense", 4, 2, micro_batch_size=1, precision="fp16"),
    SavedLayout("muon", 1, 0),
    SavedLayout("muon", 2, 1, tensor=2),
    SavedLayout("muon", 2, 2, micro_batch_size=4),
    SavedLayout("muon", 4, 2, tensor=2, sequence=2),
    SavedLayout("muon", 4, 0, tensor=4),
    SavedLayout("muon", 4, 1),
    SavedLayout("moe", 1, 1),
    SavedLayout("moe", 2, 0, expert=2, micro_batch_size=4),
    SavedLayout("moe", 2, 2, expert=2, tensor=2, precision="bf16"),
    SavedLayout("moe", 2, 3, offload="all", precision="bf16"),
    SavedLayout("moe", 4, 2, expert=4),
    SavedLayout("moe", 4, 1, expert=2, tensor=2, precision="fp16"),
    SavedLayout("moe", 4, 3, expert=2, sequence=2),
    SavedLayout("moe", 4, 3, expert=2, tensor=4, precision="bf16"),
    SavedLayout("moebias", 1, 0),
    SavedLayout("moebias", 1, 3, micro_batch_size=4),
    SavedLayout("moebias", 2, 1, expert=2, sequence=2),
    SavedLayout("moebias", 2, 2, tensor=2, offload="optimizer"),
    SavedLayout("moebias", 4, 2, expert=4, tensor=2),
    SavedLayout("moebias", 4, 3, expert=2),
    SavedLayout("moebias", 4, 1, expert=4, sequence=2, micro_batch_size=1),
)


def covering_loads(layouts: Sequence[SavedLayout]) -> list[Load]:
    """Loads among layouts of one family with every change that any two of them make, and every layout at both ends.

    First among those in fp32, where the tolerance is narrow, then what only a change of precision brings. The next is
    always the one with the most that is in none yet; of equals the one whose ends were used least, of these the first.
    So the list is the same every time.
    """
    ends = list(itertools.permutations(layouts, 2))
    loads: list[Load] = []
    for choices in (
        [Load(*pair) for pair in ends if all(layout.precision == "fp32" for layout in pair)],
        [Load(*pair) for pair in ends],
    ):
        missing = set().union(*(load.brings for load in choices)).difference(*(load.brings for load in loads))
        while missing:
            used = collections.Counter(itertools.chain.from_iterable(loads))
            loads.append(
                max(choices, key=lambda load: (len(load.brings & missing), -used[load.source] - used[load.target]))
            )
            missing -= loads[-1].brings
    return loads


LOADS = tuple(
    load for family in FAMILIES for load in covering_loads([layout for layout in LAYOUTS if layout.family == family])
)
SAME = tuple(Load(layout, layout) for layout in LAYOUTS)


def launches() -> list[tuple[int, list[str]]]:
    """(ranks, names of cases) of every launch, in order: each number of ranks is started twice at most.

    Going up, a world trains and saves its layouts and loads what is there by then; coming down, what was not.
    """
    worlds = sorted({layout.world for layout in LAYOUTS})
    steps: list[tuple[int, list[str]]] = []
    for world in worlds:
        trained = [layout.name for layout in LAYOUTS if layout.world == world]
        there = [load.name for load in (*SAME, *LOADS) if load.target.world == world >= load.source.world]
        steps.append((world, trained + there))
    for world in reversed(worlds[:-1]):
        steps.append((world, [load.name for load in LOADS if load.target.world == world < load.source.world]))
    return steps
