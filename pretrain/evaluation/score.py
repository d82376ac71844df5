"""What an evaluation adds up: sums over documents, of which each measure is a ratio.

loss = sum of -ln p(target | what its window holds before it) / tokens        nats a token
perplexity = exp(loss)
bits per byte = sum of -log2 p / raw UTF-8 bytes of the documents             comparable across tokenizers
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """Sums over some documents. `nats` is the negative log-likelihood of their `tokens` targets."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    documents: int = 0

    @classmethod
    def sum(cls, scores: Sequence["Score"]) -> "Score":
        return cls(
            nats=math.fsum(score.nats for score in scores),
            tokens=sum(score.tokens for score in scores),
            bytes=sum(score.bytes for score in scores),
            documents=sum(score.documents for score in scores),
        )

    def as_dict(self) -> dict[str, Any]:
        """What is reported: loss, perplexity, bits_per_byte and the counts behind them."""
        loss = self.nats / self.tokens
        return {
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
        }
