"""Token ids after prompts: batches of like length, each with a cache of keys and values that ended rows leave."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from pretrain.generation.beam_search import beam_search
from pretrain.generation.options import GenerationOptions
from pretrain.generation.reader import Ends, Reader
from pretrain.generation.sampling import next_tokens
from pretrain.language_model import LanguageModel

BATCH_SIZE = 8  # prompts at a time, where nobody says


@torch.inference_mode()
def generate_ids(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    eos_id: int | None,
    vocab_limit: int,
    ended: Callable[[int, list[int]], bool] = lambda _prompt, _ids: False,
    batch_size: int = BATCH_SIZE,
) -> list[list[int]]:
    """What the model writes after each prompt (of one token or more), the EOS that ends it included.

    vocab_limit: ids from there on are never written, for a model's vocabulary may be larger than its tokenizer's.
    ended: whether prompt i has ended with these tokens after it, for other reasons than EOS and length; this is where
        `options.stop` is to be looked for. Without beam search it is asked after each token but EOS, once and in order;
        in a beam search for every candidate.
    batch_size: prompts at a time; each has `options.beams` rows. It changes no draw, so results can differ only where
        two tokens are equally probable up to rounding.
    Raises ValueError if logits are not finite, or the vocabulary is too small for so many beams.
    """
    assert all(len(prompt) for prompt in prompts), "a prompt has one token at least"
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if options.beams > 1 and 2 * options.beams > vocab_limit:
        raise ValueError(
            f"beams={options.beams} must be at most half of the vocabulary, which has {vocab_limit} tokens"
        )
    written: list[list[int]] = [[] for _ in prompts]
    # The longest first: what does not fit into memory fails at once.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        texts = [prompts[index] for index in batch]
        lengths = [len(text) for text in texts]
        # The last token is written, and not read.
        reader = Reader(model, lengths, max(lengths) + options.max_new_tokens - 1, vocab_limit)

        def ends(place: int, ids: Sequence[int], batch: Sequence[int] = batch) -> bool:
            return ids[-1] == eos_id or ended(batch[place], list(ids)) or len(ids) == options.max_new_tokens

        if options.beams > 1:
            found = beam_search(reader, texts, options, ends)
        else:
            found = _token_by_token(reader, texts, options, ends, batch)
        for index, ids in zip(batch, found, strict=True):
            written[index] = ids
    return written


def _token_by_token(
    reader: Reader, prompts: Sequence[Sequence[int]], options: GenerationOptions, ends: Ends, draw_ids: Sequence[int]
) -> list[list[int]]:
    """Greedy or sampled. draw_ids: name each prompt's draws, with the seed."""
    draws = [np.random.default_rng((options.seed, draw_id)) for draw_id in draw_ids]
    written: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # of the batch: the prompts that go on
    logits_BV = reader.read(prompts)
    while True:
        for row, token in zip(
            rows, next_tokens(logits_BV, options, [draws[row].random() for row in rows]), strict=True
        ):
            written[row].append(token)
        kept = [at for at, row in enumerate(rows) if not ends(row, written[row])]
        if not kept:
            return written
        rows = [rows[at] for at in kept]
        reader.select(kept)
        logits_BV = reader.read([written[row][-1:] for row in rows])
