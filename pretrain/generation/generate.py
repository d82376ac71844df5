"""Text from a model: greedy or sampled, one sequence, with a cache of keys and values.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.kv_cache import KVCache
from pretrain.language_model import OwnModel
from pretrain.load_model import LoadedModel


@dataclass(frozen=True)
class Generation:
    """What was written after a prompt. `text` is the continuation alone, without control tokens."""

    prompt: str
    text: str
    tokens: tuple[int, ...]
    stopped_by: Literal["eos", "length"]
    start_token: str


def generate(
    model: LoadedModel, prompt: str, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0
) -> Generation:
    """Continue `prompt` until EOS or for `max_new_tokens`.

    temperature 0 takes the most probable token; otherwise tokens are drawn from softmax(logits / temperature) by a
    generator of its own with `seed`, so that the same call writes the same text on the same kind of device.
    Raises ValueError for a temperature below 0 or a `max_new_tokens` below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be a finite number, 0 (greedy) or more")
    start, start_token = model.start_token
    prompt_ids = model.tokenizer.encode(prompt)
    tokens = continue_ids(model, [start, *prompt_ids], max_new_tokens, temperature, seed)
    ended = tokens[-1] == model.tokenizer.eos_id
    # Whole sequences are decoded: a character may be spelled in bytes over several tokens, and some tokenizers treat
    # the first token of a text in their own way, so the continuation is what comes after the decoded prompt.
    written = model.tokenizer.decode([*prompt_ids, *(tokens[:-1] if ended else tokens)])
    text = written.removeprefix(model.tokenizer.decode(prompt_ids))
    return Generation(prompt, text, tuple(tokens), "eos" if ended else "length", start_token)


@torch.inference_mode()
def continue_ids(
    model: LoadedModel, ids: Sequence[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[int]:
    """Token ids after `ids` (at least one), the EOS that ends them included."""
    assert isinstance(model.model, OwnModel)
    decoder = model.model.decoder
    weight = decoder.embed_tokens.weight
    cache = KVCache(decoder.config, 1, len(ids) + max_new_tokens, weight.dtype, weight.device)
    generator = torch.Generator(weight.device).manual_seed(seed)
    unread = torch.tensor([list(ids)], device=weight.device)
    written: list[int] = []
    while len(written) < max_new_tokens and (not written or written[-1] != model.tokenizer.eos_id):
        hidden_1TD = decoder.hidden(unread, cache=cache)
        # A model's vocabulary may be larger than its tokenizer's; what has no piece cannot be written.
        logits_V = decoder.logits(hidden_1TD[0, -1])[: model.tokenizer.vocab_size]
        unread = _chosen(logits_V, temperature, generator).view(1, 1)
        written.append(int(unread))
    return written


def _chosen(logits_V: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits_V.argmax()
    return torch.multinomial((logits_V / temperature).softmax(dim=-1), 1, generator=generator)
