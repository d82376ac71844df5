"""Keys and values of the tokens already read, for decoding one token at a time.

B batch, T new tokens, S tokens so far, K key and value heads, h head size.
"""

from collections.abc import Sequence

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

    def select(self, rows: Tensor, first: int) -> None:
        """Hold these rows, and of each what is stored from `first` on."""
        self.key, self.value = (_selected(stored, rows, first, self.length) for stored in (self.key, self.value))
        self.length -= first


class KVCache:
    """Preallocated keys and values of every layer: 2 L B K max_tokens h elements.

    All rows hold equally many tokens, the first `padding[row]` of which are padding on the left: no token sees those,
    and positions count from the first that is none. Give `Decoder.hidden` the new tokens only.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        padding: Sequence[int] | None = None,
    ) -> None:
        """padding: of each row, default 0."""
        shape = (batch_size, config.num_kv_heads, max_tokens, config.head_size)
        self.padding = [0] * batch_size if padding is None else list(padding)
        assert len(self.padding) == batch_size, f"padding of {len(self.padding)} rows, there are {batch_size}"
        self.max_tokens = max_tokens
        self.device = torch.device(device)
        self.layers = [
            LayerCache(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(config.num_layers)
        ]
        self._first_B = self._padding_tensor()

    @property
    def length(self) -> int:
        """Tokens of a row read so far, its padding included."""
        return self.layers[-1].length

    def positions(self, T: int) -> Tensor:
        """Positions of the next T tokens: (T,) if they are those of every row, else (B, T), 0 for padding."""
        slots_T = torch.arange(self.length, self.length + T, device=self.device)
        return slots_T if self._first_B is None else (slots_T - self._first_B[:, None]).clamp(min=0)

    def mask(self, T: int) -> Tensor | None:
        """Which of the tokens so far and the next T each of these sees, (B or 1, 1, T, S) bool; None where plain
        causal attention (or none, for one token) says it all.

        Padding sees the padding before it, so that no softmax is over nothing: kernels differ in what they make of
        that, and a NaN in a key or value would reach every token by a weight of 0.
        """
        past = self.length
        if self._first_B is None and (past == 0 or T == 1):
            return None
        causal_TS = torch.ones(T, past + T, dtype=torch.bool, device=self.device).tril(past)
        if self._first_B is None:
            return causal_TS[None, None]
        slots_S = torch.arange(past + T, device=self.device)
        is_text_BS = slots_S >= self._first_B[:, None]
        seen_BTS = causal_TS & (is_text_BS[:, None, :] | ~is_text_BS[:, past:, None])
        return seen_BTS[:, None]

    def select(self, rows: Sequence[int]) -> None:
        """Hold these rows from now on, in this order; a row may be named several times, or not at all.

        Padding that all of them begin with is dropped. One layer at a time is copied, unless nothing changes.
        """
        if list(rows) == list(range(len(self.padding))):
            return
        kept = [self.padding[row] for row in rows]
        first = min(kept)
        rows_B = torch.tensor(rows, device=self.device)
        for layer in self.layers:
            layer.select(rows_B, first)
        self.padding = [padding - first for padding in kept]
        self._first_B = self._padding_tensor()

    def _padding_tensor(self) -> Tensor | None:
        return torch.tensor(self.padding, device=self.device) if any(self.padding) else None


def _selected(stored_BKSh: Tensor, rows: Tensor, first: int, length: int) -> Tensor:
    selected_BKSh = stored_BKSh.new_empty((len(rows), *stored_BKSh.shape[1:]))
    selected_BKSh[:, :, : length - first] = stored_BKSh[rows, :, first:length]
    return selected_BKSh
