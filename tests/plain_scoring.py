"""A document's loss by transformers alone, in the plainest way, and ours of documents in memory."""

import itertools
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from pretrain.evaluation.evaluate import score_documents
from pretrain.evaluation.record import DocumentScore, RecordsWriter, read_scores
from pretrain.evaluation.texts import EvaluationDocument
from pretrain.evaluation.windows import Windowing
from pretrain.load_model import LoadedModel


@torch.no_grad()
def plain_nats(hf: Any, ids: Sequence[int], window: int | Literal["document"], stride: int | None) -> float:
    """Summed -ln p of one document `[start, t1, .. tn, EOS]`, one window after another."""
    if window == "document":
        window = stride = len(ids)
    assert stride is not None
    nats, scored = 0.0, 0
    for begin in itertools.count(0, stride):
        targets = ids[begin + 1 : begin + window + 1]
        inputs = ids[begin : begin + len(targets)]
        log_p = hf(torch.tensor([inputs])).logits[0].double().log_softmax(-1)
        for at, target in enumerate(targets):
            if begin + at >= scored:
                nats -= log_p[at, target].item()
                scored = begin + at + 1
        if scored == len(ids) - 1:
            return nats
    raise AssertionError("unreachable")


def in_memory(texts: Iterable[str], domain: str = "memory", first: int = 0) -> list[EvaluationDocument]:
    """Documents of these texts, numbered from `first`."""
    return [EvaluationDocument(first + at, domain, text) for at, text in enumerate(texts)]


def our_scores(
    model: LoadedModel, documents: Iterable[EvaluationDocument], windowing: Windowing, world: int = 1
) -> dict[int, DocumentScore]:
    """By index, of so many ranks in turn."""
    documents = list(documents)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rank in range(world):
            with RecordsWriter(folder, rank) as records:
                score_documents(model, documents, windowing, records, rank, world)
        scores = list(read_scores(folder))
    assert len({score.index for score in scores}) == len(scores), "a document was recorded twice"
    return {score.index: score for score in sorted(scores, key=lambda score: score.index)}
