"""How a continuation is chosen: plain values, checked. No torch here, so that a command can refuse them at once."""

import math
from dataclasses import dataclass

LEAST_TEMPERATURE = 1e-6  # logits that are divided by far less are beyond fp32


@dataclass(frozen=True)
class GenerationOptions:
    """Greedy by default; sampling with a temperature above 0; beam search with more than one beam.

    max_new_tokens: where a continuation ends if nothing has ended it before; EOS counts.
    temperature: logits are divided by it before anything else; 0 takes the most probable token each time.
    top_k: only so many tokens, the most probable ones, can be drawn (Fan et al. 2018, arXiv 1805.04833, section 5.1).
    top_p: only the most probable tokens whose probabilities, after `top_k`, add up to it can be drawn (Holtzman et al.
        2020, arXiv 1904.09751, section 3.1).
    beams: continuations of a prompt that are kept side by side; the best that has ended is the result.
    length_penalty: a continuation of n tokens scores (sum of log-probabilities) / n**length_penalty.
    early_stopping: end a beam search once `beams` continuations have ended, rather than when none that is still open
        could beat the worst of them at its present length.
    seed: of the draws; those of a prompt depend on it and on the prompt's place, and on nothing else.
    stop: strings that end a continuation; neither they nor what follows is part of its text.
    Raises ValueError for values out of range, and for those that would have no effect.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be a finite number, 0 (greedy) or more")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature={self.temperature} must be 0, which takes the most probable token each time, or at least "
                f"{LEAST_TEMPERATURE}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; leave it out to draw from all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1 (all tokens)")
        if self.beams < 1:
            raise ValueError(f"beams={self.beams} must be at least 1 (no beam search)")
        if not abs(self.length_penalty) <= 10:
            raise ValueError(f"length_penalty={self.length_penalty} must be from -10 to 10; 1 is the mean")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be 0 or more")
        if "" in self.stop:
            raise ValueError("stop='' would end a continuation before it begins: name a string that has characters")
        self._refuse_what_has_no_effect()

    def _refuse_what_has_no_effect(self) -> None:
        if self.beams > 1 and self.temperature > 0:
            raise ValueError(
                f"beams={self.beams} with temperature={self.temperature}: beam search draws nothing; leave one out"
            )
        for name, value in (("top_k", self.top_k), ("top_p", self.top_p)):
            if value is not None and self.temperature == 0:
                raise ValueError(
                    f"{name}={value} has no effect at temperature=0, which takes the most probable token: set a "
                    "temperature above 0 (1 draws from the model's own distribution)"
                )
        if self.beams == 1 and (self.length_penalty != 1 or self.early_stopping):
            name, value = ("early_stopping", True) if self.early_stopping else ("length_penalty", self.length_penalty)
            raise ValueError(f"{name}={value} has no effect without beam search: set beams to 2 or more")
