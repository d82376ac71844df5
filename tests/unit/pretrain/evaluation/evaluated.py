"""Folders of finished evaluations, of documents whose scores are made up."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.evaluation.folder import Cost, Facts, write_facts
from pretrain.evaluation.record import DocumentScore, RecordsWriter, position_of

FACTS = Facts(
    model="runs/first",
    step=1000,
    passed_over=("step_2000: its index is missing",),
    precision="fp32",
    offload=None,
    window=128,
    stride=64,
    context_length=128,
    start_token="bos",
    eos_scored=True,
    tokenizer="a1b2",
    domains=("books", "code"),
    notes=("The weights are padded.",),
    cost=Cost(seconds=2.0, tokens_per_second=500.0, peak_memory_bytes=1 << 20, ranks=2),
)


def write_evaluation(folder: Path, documents: Sequence[DocumentScore], facts: Facts = FACTS) -> Path:
    """As two ranks leave it; each document's nats lie evenly on its targets, the context of which is its own."""
    for rank in range(2):
        with RecordsWriter(folder, rank) as records:
            for document in documents[rank::2]:
                tokens = np.bincount(position_of(np.arange(document.tokens)), minlength=1)
                records.add(document, tokens, tokens * document.nats / max(1, document.tokens))
    write_facts(folder, facts)
    return folder


def scored(
    count: int, seed: int = 0, domains: Sequence[str] = ("books", "code"), gain: float = 0.0
) -> list[DocumentScore]:
    """By a model that is `gain` nats a token better than the one of gain 0 on the same documents, give or take a tenth
    of a nat by document; how hard the documents are differs by far more. The first half is of the first domain."""
    draw = np.random.default_rng(seed)
    tokens = 20 + draw.lognormal(4.0, 0.7, count).astype(np.int64)
    nats_per_token = draw.gamma(9.0, 1 / 3.0, count)
    if gain:
        nats_per_token = nats_per_token - gain + draw.normal(0.0, 0.1, count)
    return [
        DocumentScore(i, domains[i * len(domains) // count], float(n * loss), int(n), int(4 * n), int(n), f"{i:016x}")
        for i, (n, loss) in enumerate(zip(tokens, nats_per_token, strict=True))
    ]


def changed(documents: Sequence[DocumentScore], at: int, **fields: Any) -> list[DocumentScore]:
    """The same documents but for one."""
    return [replace(document, **fields) if document.index == at else document for document in documents]
