"""Keys and values of the tokens already read, for decoding one token at a time."""

import torch
from torch import Tensor

from model.config import ModelConfig


class LayerCache:
    """One layer's keys and values, (B, K, max_tokens, h), filled from the left."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value
        self.length = 0

    def append(self, key_BTKh: Tensor, value_BTKh: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values; returns those of all tokens so far, (B, length, K, h) views."""
        start, self.length = self.length, self.length + key_BTKh.size(1)
        assert self.length <= self.key.size(2), f"{self.length} tokens in a cache of {self.key.size(2)}"
        self.key[:, :, start : self.length] = key_BTKh.transpose(1, 2)
        self.value[:, :, start : self.length] = value_BTKh.transpose(1, 2)
        return self.key[:, :, : self.length].transpose(1, 2), self.value[:, :, : self.length].transpose(1, 2)


class KVCache:
    """Preallocated keys and values of every layer: 2 L B K max_tokens h elements.

    All rows of the batch have the same length: give `Decoder.hidden` the new tokens only.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch_size, config.num_kv_heads, max_tokens, config.head_size)
        self.max_tokens = max_tokens
        self.layers = [
            LayerCache(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(config.num_layers)
        ]

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.layers[-1].length
