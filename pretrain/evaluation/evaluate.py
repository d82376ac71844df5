"""Perplexity by documents: every token of a corpus is scored exactly once, given the start of its own document.

A document's targets are its tokens t1 .. tn and the EOS that ends it; its inputs are the start token and t1 .. tn. A
document that is longer than the window W is read through windows that begin every S targets (the stride): each counts
only the targets that no earlier window has scored, so S < W gives every later token at least W - S tokens of context.

    loss = sum of -ln p(target | what its window holds before it) / tokens        nats a token
    perplexity = exp(loss)
    bits per byte = sum of -log2 p / raw UTF-8 bytes of the documents             comparable across tokenizers

Each is a ratio of sums over the corpus, held in fp64; nothing is averaged over batches, windows or ranks.
Shapes: B windows of a batch, T the longest of them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline.batch import IGNORED_TARGET
from data_pipeline.corpus.document import Document
from pretrain.evaluation.score import Score
from pretrain.evaluation.windows import Window, Windowing, document_windows, packed, padded
from pretrain.load_model import LoadedModel


@dataclass(frozen=True)
class Evaluation:
    """The scores of a corpus by domain, and the conventions without which they cannot be compared.

    start_token: what the first token of a document is given: "bos", or "eos" for a tokenizer without BOS.
    eos_scored: False for a tokenizer without EOS, where nothing tells that a document ends.
    """

    by_domain: Mapping[str, Score]
    window: int
    stride: int
    start_token: str
    eos_scored: bool

    @classmethod
    def of(cls, model: LoadedModel, windowing: Windowing, shares: Sequence[Mapping[str, Score]]) -> "Evaluation":
        """Add up the ranks' shares. Raises ValueError for a domain whose sums mean nothing."""
        by_domain = {name: Score.sum([share[name] for share in shares]) for name in shares[0]}
        for name, score in by_domain.items():
            _check(name, score)
        _, start_token = model.start_token
        eos_scored = model.tokenizer.eos_id is not None
        return cls(by_domain, windowing.window, windowing.stride, start_token, eos_scored)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values: the whole corpus, each domain under `by_domain`, and the conventions."""
        return {
            **Score.sum(list(self.by_domain.values())).as_dict(),
            "by_domain": {name: score.as_dict() for name, score in self.by_domain.items()},
            "window": self.window,
            "stride": self.stride,
            "start_token": self.start_token,
            "eos_scored": self.eos_scored,
        }


def evaluate(model: LoadedModel, domains: Mapping[str, Iterable[Document]], windowing: Windowing) -> Evaluation:
    """Score every document of every domain in this process. Raises ValueError for a domain without text, and for a
    loss that is not finite."""
    return Evaluation.of(model, windowing, [score(model, domains, windowing)])


@torch.inference_mode()
def score(
    model: LoadedModel,
    domains: Mapping[str, Iterable[Document]],
    windowing: Windowing,
    rank: int = 0,
    world: int = 1,
    on_progress: Callable[[Score], None] = lambda so_far: None,
) -> dict[str, Score]:
    """The sums of this rank's share of each domain; all ranks' shares together are the corpus.

    Neither `batch_tokens` nor `world` changes the total beyond the rounding of a forward pass. Memory is bounded by the
    longest document, never by the corpus. `on_progress` is told after each batch, without the nats, which stay on the
    device until the end.
    """
    device = model.model.device
    rows = {name: row for row, name in enumerate(domains)}
    nats = torch.zeros(len(rows), dtype=torch.float64, device=device)
    counts = np.zeros((len(rows), 3), dtype=np.int64)  # tokens, bytes, documents
    for batch in packed(_windows(model, deal(domains, rank, world), windowing), windowing.batch_tokens):
        inputs_BT, targets_BT = (tensor.to(device) for tensor in padded(batch))
        losses_BT = model.model.token_losses(inputs_BT, targets_BT)
        nats.index_add_(0, torch.tensor([rows[row.domain] for row in batch], device=device), losses_BT.double().sum(1))
        for row in batch:
            counts[rows[row.domain]] += (row.targets != IGNORED_TARGET).sum(), row.text_bytes, row.ends
        on_progress(Score(0.0, *counts.sum(axis=0).tolist()))
    return {name: Score(nats[row].item(), *counts[row].tolist()) for name, row in rows.items()}


def _check(name: str, score: Score) -> None:
    """Raise ValueError for sums that mean nothing."""
    if not score.bytes or not score.tokens:
        raise ValueError(
            f"{name}: nothing to measure in {score.documents} documents, {score.bytes} bytes, {score.tokens} tokens: "
            "name a corpus that holds text"
        )
    if not math.isfinite(score.nats):
        raise ValueError(f"{name}: the loss is {score.nats}, so the model overflows in this precision: try fp32")


def deal(domains: Mapping[str, Iterable[Document]], rank: int, world: int) -> Iterator[tuple[str, Document]]:
    """This rank's documents with their domains: each document goes to the rank that was dealt the least text so far.

    A pure function of the corpus, so that the ranks agree without a word, and finish at about the same time.
    """
    load_characters = [0] * world
    for name, documents in domains.items():
        for document in documents:
            owner = load_characters.index(min(load_characters))
            load_characters[owner] += len(document.text) + 1  # 1: empty documents go round, too
            if owner == rank:
                yield name, document


def _windows(model: LoadedModel, documents: Iterable[tuple[str, Document]], windowing: Windowing) -> Iterator[Window]:
    start, _ = model.start_token
    for name, document in documents:
        ids = model.tokenizer.encode_batch([document.text])[0]
        text_bytes = len(document.text.encode("utf-8"))
        yield from document_windows(ids, start, model.tokenizer.eos_id, windowing, name, text_bytes)
