"""What evaluation and generation ask of a model, whoever computes it.

Shapes: B rows, T tokens of a row, V vocabulary.
"""

from typing import Protocol

import torch
from torch import Tensor

from model.decoder import Decoder


class LanguageModel(Protocol):
    """A causal model on one device, without gradients. Rows are independent; causality hides padding on the right."""

    vocab_size: int
    device: torch.device

    def token_losses(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Negative log-likelihood (nats) of each target, (B, T) fp32, 0 where it is -100: those need no logits."""

    def logits_at(self, tokens_BT: Tensor, at_BT: Tensor) -> Tensor:
        """Logits (n, V) fp32 of what follows the n tokens at which `at_BT` (bool) is true, row by row."""


class OwnModel:
    """Our decoder as a `LanguageModel`."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.vocab_size = decoder.config.vocab_size
        self.device = decoder.embed_tokens.weight.device

    def token_losses(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.decoder.token_losses(tokens_BT, targets_BT)

    def logits_at(self, tokens_BT: Tensor, at_BT: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.decoder.logits(self.decoder.hidden(tokens_BT)[at_BT])
