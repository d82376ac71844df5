"""Keys and values of a model that transformers computes, for rows whose prompts differ in length.

Shapes: B rows, T new tokens of a row, S tokens so far with padding, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


class TransformersCache:
    """The model's own cache, which grows with each token; and which of the tokens so far are text, not padding."""

    def __init__(self, model: PreTrainedModel, prompt_lengths: Sequence[int], device: torch.device) -> None:
        self._model, self._device = model, device
        self._parameters = inspect.signature(model.forward).parameters
        longest = max(prompt_lengths)
        self._is_text_BS = torch.tensor([[0] * (longest - n) + [1] * n for n in prompt_lengths], device=device)
        self._stored: Any = None  # as the model made it: which kind of cache that is depends on the architecture

    def next_logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, V) fp32 of what follows each row's last token; see `LanguageModel.next_logits`.

        Raises ValueError if the model keeps no keys and values.
        """
        T = tokens_BT.size(1)
        if self._stored is not None:
            self._is_text_BS = torch.cat([self._is_text_BS, torch.ones_like(tokens_BT)], dim=1)
        inputs: dict[str, Any] = {"use_cache": True, "attention_mask": self._is_text_BS}
        if "position_ids" in self._parameters:
            inputs["position_ids"] = (self._is_text_BS.cumsum(dim=1) - 1).clamp(min=0)[:, -T:]
        if "logits_to_keep" in self._parameters:
            inputs["logits_to_keep"] = 1
        if self._stored is not None:
            inputs["past_key_values"] = self._stored
        output = self._model(tokens_BT, **inputs)
        self._stored = getattr(output, "past_key_values", None)
        if self._stored is None:
            raise ValueError(f"{type(self._model).__name__} keeps no keys and values: Steppe cannot write with it")
        return output.logits[:, -1].float()

    def select(self, rows: Sequence[int]) -> None:
        """Hold these rows from now on, in this order; a row may be named several times, or not at all."""
        if list(rows) == list(range(len(self._is_text_BS))):
            return
        rows_B = torch.tensor(rows, device=self._device)
        self._is_text_BS = self._is_text_BS[rows_B]
        self._stored.batch_select_indices(rows_B)
