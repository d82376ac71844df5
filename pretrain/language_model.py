"""What evaluation and generation ask of a model, whoever computes it.

Shapes: B rows, T tokens of a row, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.decoder import Decoder
from model.kv_cache import KVCache


class Cache(Protocol):
    """What a model keeps of the tokens that each row has read, so that it need not read them again."""

    def select(self, rows: Sequence[int]) -> None:
        """Hold these rows from now on, in this order; a row may be named several times, or not at all."""


class LanguageModel(Protocol):
    """A causal model on one device, without gradients. Rows are independent; causality hides padding on the right."""

    vocab_size: int
    device: torch.device

    def token_losses(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Negative log-likelihood (nats) of each target, (B, T) fp32, 0 where it is -100: those need no logits."""

    def logits_at(self, tokens_BT: Tensor, at_BT: Tensor) -> Tensor:
        """Logits (n, V) fp32 of what follows the n tokens at which `at_BT` (bool) is true, row by row."""

    def new_cache(self, prompt_lengths: Sequence[int], max_tokens: int) -> Cache:
        """An empty cache for rows whose prompts are so long, and which the longest grows to `max_tokens` in."""

    def next_logits(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        """Logits (B, V) fp32 of what follows each row's last token, after what the cache holds; it grows by T.

        The first call reads the prompts, padded on the left to the longest.
        """


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

    def new_cache(self, prompt_lengths: Sequence[int], max_tokens: int) -> KVCache:
        longest = max(prompt_lengths)
        padding = [longest - length for length in prompt_lengths]
        dtype = self.decoder.embed_tokens.weight.dtype
        return KVCache(self.decoder.config, len(padding), max_tokens, dtype, self.device, padding)

    def next_logits(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        assert isinstance(cache, KVCache)
        with torch.inference_mode():
            return self.decoder.logits(self.decoder.hidden(tokens_BT, cache=cache)[:, -1])
