"""A model that transformers computes, as evaluation and generation ask for one.

Shapes: B rows, T tokens of a row, V vocabulary; C columns of T whose logits are wanted.
"""

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from data_pipeline.batch import IGNORED_TARGET
from pretrain.language_model import Cache
from pretrain.transformers_cache import TransformersCache

LOGITS = 1 << 27  # at a time, 512 MiB in fp32: a vocabulary of 150,000 would fill any memory with those of a batch


class TransformersModel:
    """A model of transformers as a `LanguageModel`.

    Its logits are taken as it computes them, for what it does to them in the end is its own (a bias, a cap, a scale).
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model, self.device = model, device
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self._takes_columns = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def token_losses(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        losses_BT = torch.zeros(targets_BT.shape, dtype=torch.float32, device=targets_BT.device)
        for row, columns, logits_CV in self._logits(tokens_BT, targets_BT != IGNORED_TARGET):
            targets_C = targets_BT[row, columns]
            losses_BT[row, columns] = functional.cross_entropy(
                logits_CV, targets_C, ignore_index=IGNORED_TARGET, reduction="none"
            )
        return losses_BT

    @torch.inference_mode()
    def logits_at(self, tokens_BT: Tensor, at_BT: Tensor) -> Tensor:
        found = [logits_CV[at_BT[row, columns]] for row, columns, logits_CV in self._logits(tokens_BT, at_BT)]
        return torch.cat(found) if found else torch.empty(0, self.vocab_size, device=tokens_BT.device)

    def new_cache(self, prompt_lengths: Sequence[int], max_tokens: int) -> TransformersCache:
        return TransformersCache(self.model, prompt_lengths, self.device)  # which grows as far as it is read

    @torch.inference_mode()
    def next_logits(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        assert isinstance(cache, TransformersCache)
        return cache.next_logits(tokens_BT)

    def _logits(self, tokens_BT: Tensor, wanted_BT: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(row, columns, their logits (C, V) fp32) of every row; the columns are those that its group's rows want.

        Without an attention mask, so that positions count from 0 at each row's first token.
        """
        columns = wanted_BT.any(dim=0).nonzero().flatten()
        if not len(columns):
            return
        width = len(columns) if self._takes_columns else tokens_BT.size(1)
        rows = max(1, LOGITS // (width * self.vocab_size))
        for first in range(0, len(tokens_BT), rows):
            group_BT = tokens_BT[first : first + rows]
            if self._takes_columns:
                logits_BCV = self.model(group_BT, use_cache=False, logits_to_keep=columns).logits
            else:
                logits_BCV = self.model(group_BT, use_cache=False).logits[:, columns]
            for at, logits_CV in enumerate(logits_BCV):
                yield first + at, columns, logits_CV.float()
