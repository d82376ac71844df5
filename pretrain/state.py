"""What the trainer knows besides the engine's tensors: small, explicit, complete."""

from dataclasses import dataclass, field
from typing import Any

from data_pipeline.order import Stage


@dataclass
class TrainState:
    """Where a run stands.

    step      optimizer steps made
    position  sequences consumed: the argument of the sample order
    tokens    input tokens consumed, position times the sequence length of its time; lengths in tokens count these
    stages    mixtures and the positions at which they begin; the sample order's only other argument

    There is no random state: after initialisation, which is a function of the seed, training draws no random number.
    """

    step: int = 0
    position: int = 0
    tokens: int = 0
    stages: list[Stage] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "step": self.step,
            "position": self.position,
            "tokens": self.tokens,
            "stages": [{"start": stage.start, "weights": stage.weights} for stage in self.stages],
        }

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> "TrainState":
        """The inverse of `state_dict`."""
        return cls(**{**saved, "stages": [Stage(**stage) for stage in saved["stages"]]})

    def set_mixture(self, weights: dict[str, float]) -> bool:
        """Begin a stage here if `weights` differs from the present mixture; says whether it did."""
        if self.stages and self.stages[-1].weights == weights:
            return False
        self.stages.append(Stage(self.position, weights))
        return True

    def advance(self, sequences: int, sequence_length: int) -> None:
        """One optimizer step over `sequences` sequences is made."""
        self.step += 1
        self.position += sequences
        self.tokens += sequences * sequence_length
