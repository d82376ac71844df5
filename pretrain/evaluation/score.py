"""What an evaluation adds up: sums over documents, of which each measure is a ratio.

loss = sum of -ln p(target | what its window holds before it) / tokens        nats a token
perplexity = exp(loss); of a word and of a byte with the words and the bytes of the text in place of the tokens
bits per byte = sum of -log2 p / raw UTF-8 bytes of the documents             comparable across tokenizers
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

LEVEL = 0.95  # of the intervals of measures

Unit = Literal["tokens", "words", "bytes"]


def _exp(nats: float) -> float:
    """e to the nats; inf beyond fp64, as in a text without white space, which is one word of a thousand nats."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


class Measure(NamedTuple):
    """A measure as a function of the nats per unit, increasing in them."""

    unit: Unit
    of: Callable[[float], float]


MEASURES: Mapping[str, Measure] = {
    "loss": Measure("tokens", float),
    "perplexity": Measure("tokens", _exp),
    "word_perplexity": Measure("words", _exp),
    "byte_perplexity": Measure("bytes", _exp),
    "bits_per_byte": Measure("bytes", lambda nats: nats / math.log(2)),
}


@dataclass(frozen=True)
class Score:
    """Sums over some documents. `nats` is the negative log-likelihood of their `tokens` targets.

    Measures are inf where they are beyond fp64 or have nothing to be divided by, such as words.
    """

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    words: int = 0
    documents: int = 0

    @classmethod
    def sum(cls, scores: Sequence["Score"]) -> "Score":
        """Of all of them together, the same in any order."""
        return cls(
            nats=math.fsum(score.nats for score in scores),
            tokens=sum(score.tokens for score in scores),
            bytes=sum(score.bytes for score in scores),
            words=sum(score.words for score in scores),
            documents=sum(score.documents for score in scores),
        )

    def measure(self, name: str) -> float:
        """One of `MEASURES`."""
        unit, of = MEASURES[name]
        count = getattr(self, unit)
        return of(self.nats / count) if count else math.inf

    @property
    def loss(self) -> float:
        return self.measure("loss")

    @property
    def perplexity(self) -> float:
        return self.measure("perplexity")

    @property
    def word_perplexity(self) -> float:
        return self.measure("word_perplexity")

    @property
    def byte_perplexity(self) -> float:
        return self.measure("byte_perplexity")

    @property
    def bits_per_byte(self) -> float:
        return self.measure("bits_per_byte")

    def as_dict(self) -> dict[str, Any]:
        """The measures and the counts behind them, as JSON values: a measure that is no number is None."""
        return {
            **{name: _finite(self.measure(name)) for name in MEASURES},
            "tokens": self.tokens,
            "bytes": self.bytes,
            "words": self.words,
            "documents": self.documents,
        }


def _finite(value: float) -> float | None:
    """A number as JSON has it, which knows no inf."""
    return value if math.isfinite(value) else None
