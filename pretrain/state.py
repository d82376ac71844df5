"""What the trainer knows besides the engine's tensors: small, explicit, complete."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from pretrain.data_plan import with_stage
from pretrain.data_stages import DataStage, Place, next_position


@dataclass
class TrainState:
    """Where a run stands.

    step      optimizer steps made
    position  samples consumed: the argument of the sample order
    tokens    input tokens consumed, each sample with the sequence length of its time; lengths in tokens count these
    stages    mixtures, sequence lengths and batch sizes, and where they began; the sample order's only other argument
    left_out  ranges [start, end) of positions that are never read
    losses    of the last steps, by which a spike is told (`pretrain/health.py`); empty where none is looked for
    skipped   steps in a row, this one last, whose gradient was not finite

    There is no random state: after initialisation, which is a function of the seed, training draws no random number.
    """

    step: int = 0
    position: int = 0
    tokens: int = 0
    stages: list[DataStage] = field(default_factory=list)
    left_out: list[tuple[int, int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    skipped: int = 0

    def state_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "step": self.step,
            "position": self.position,
            "tokens": self.tokens,
            "stages": [asdict(stage) for stage in self.stages],
            "left_out": [list(pair) for pair in self.left_out],
            "losses": list(self.losses),
            "skipped": self.skipped,
        }

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> "TrainState":
        """The inverse of `state_dict`; what an older checkpoint lacks is empty."""
        stages = [_stage(**stage) for stage in saved["stages"]]
        left_out = [(start, end) for start, end in saved.get("left_out", [])]
        return cls(**{**saved, "stages": stages, "left_out": left_out})

    @property
    def place(self) -> Place:
        """Where it stands in its data."""
        return Place(self.step, self.position, self.tokens)

    def begin_stage(self, stage: DataStage) -> bool:
        """Go on by this stage from here; says whether it is news."""
        before, self.stages = self.stages, with_stage(self.stages, stage)
        return self.stages != before

    def leave_out(self, data: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Never read these ranges of positions from here on; returns what of them is new. What was read stays so."""
        to_come = ((max(start, self.position), end) for start, end in data)
        new = [pair for pair in to_come if pair[0] < pair[1] and pair not in self.left_out]
        self.left_out = sorted([*self.left_out, *new])
        return new

    def advance(self, sequences: int, tokens: int) -> None:
        """One optimizer step over the next so many sequences, of so many tokens in all, is made."""
        self.step += 1
        self.position = next_position(self.position, sequences, self.left_out) + sequences
        self.tokens += tokens


def _stage(begin: dict[str, int] | None = None, ramp: Iterable[list[int]] = (), **rest: Any) -> DataStage:
    if begin is None:
        raise ValueError(
            "the checkpoint is of an earlier Steppe, which did not note the sequence length and the batch size of each "
            "stage of its data: go on with that version, or start a new run with init_from"
        )
    return DataStage(begin=Place(**begin), ramp=tuple((end, size) for end, size in ramp), **rest)
