"""A model that reads one batch of rows, at first their prompts and then what is written after them.

Shapes: B rows, T new tokens of a row, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pretrain.language_model import LanguageModel

Ends = Callable[[int, Sequence[int]], bool]
"""Whether prompt i of a batch has its whole continuation with these tokens, the last of which is new."""


class Reader:
    """A model and its cache of a batch."""

    def __init__(self, model: LanguageModel, prompt_lengths: Sequence[int], max_tokens: int, vocab_limit: int) -> None:
        """max_tokens: that the longest row will be read to. vocab_limit: ids from there on are not to be written."""
        self._model, self._vocab_limit = model, vocab_limit
        self._cache = model.new_cache(prompt_lengths, max_tokens)

    def read(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The new tokens of each row -> logits (B, V) fp32 of what follows them.

        Raises ValueError if they are not finite.
        """
        longest = max(map(len, rows))
        # A batch has its text at the right; what fills the left is never looked at.
        tokens_BT = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=self._model.device)
        logits_BV = self._model.next_logits(tokens_BT, self._cache)[:, : self._vocab_limit]
        if not logits_BV.isfinite().all():
            raise ValueError(
                "the model's logits are not finite, so there is no next token: compute with --precision fp32, or use "
                "an earlier checkpoint"
            )
        return logits_BV

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; a row may be named several times, or not at all."""
        self._cache.select(rows)
