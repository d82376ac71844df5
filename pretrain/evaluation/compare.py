"""Two models on the same documents: how much their measures differ, and how sure that is.

A document that is hard for one model is hard for another, so the difference is far surer than either measure. Both are
resampled with the same weights, and a replicate's difference is that of its two measures (Efron and Tibshirani 1993,
"An Introduction to the Bootstrap", on paired data).
"""

import itertools
from pathlib import Path
from typing import Any

from pretrain.evaluation.bootstrap import Resampled, Sums, percentiles
from pretrain.evaluation.record import read_scores
from pretrain.evaluation.score import MEASURES

ACROSS_TOKENIZERS = ("bits_per_byte",)
WITH_ONE_TOKENIZER = (*ACROSS_TOKENIZERS, "loss")
STRETCH_DOCUMENTS = 1 << 16  # that are held at once in search of the first that differs


def comparison(this: Resampled, other: Resampled, same_tokenizer: bool) -> dict[str, Any]:
    """This model's measures minus those of the other, over all documents and by domain.

    Losses are compared with one tokenizer only: they are per token. An interval is None for a single document.
    """
    names = WITH_ONE_TOKENIZER if same_tokenizer else ACROSS_TOKENIZERS
    return {
        **_differences(this.whole, other.whole, names),
        "by_domain": {name: _differences(sums, other.by_domain[name], names) for name, sums in this.by_domain.items()},
    }


def _differences(this: Sums, other: Sums, names: tuple[str, ...]) -> dict[str, Any]:
    measures = {}
    for name in names:
        unit, of = MEASURES[name]
        bounds = percentiles(this.nats_per(unit) - other.nats_per(unit)) if this.score.documents > 1 else None
        measures[name] = {
            "difference": this.score.measure(name) - other.score.measure(name),
            # These measures are multiples of the nats per unit, and so are their differences.
            "interval": None if bounds is None else [of(bound) for bound in bounds],
        }
    return {"measures": measures, "documents": this.score.documents}


def check_same_documents(this_folder: Path, this: Resampled, other_folder: Path, other: Resampled) -> None:
    """Raise ValueError, naming the first document that differs, unless both evaluations are of the same ones.

    Looking for it reads both folders once a stretch, so that no more than a stretch is held.
    """
    if this.identity == other.identity:
        return
    for begin in itertools.count(0, STRETCH_DOCUMENTS):
        mine, theirs = _stretch(this_folder, begin), _stretch(other_folder, begin)
        for index in sorted(mine.keys() | theirs.keys()):
            if mine.get(index) != theirs.get(index):
                raise ValueError(
                    f"{other_folder} holds other documents: number {index} is {_described(theirs.get(index))} there, "
                    f"{_described(mine.get(index))} here; compare evaluations of the same texts in the same domains"
                )
        if not mine and not theirs:
            raise ValueError(f"{this_folder} or {other_folder} holds a document twice: evaluate again in a new folder")


def _stretch(folder: Path, begin: int) -> dict[int, tuple[str, str]]:
    """Domain and hash of the text of a stretch of documents, by index."""
    return {
        document.index: (document.domain, document.text_xxh3)
        for document in read_scores(folder)
        if begin <= document.index < begin + STRETCH_DOCUMENTS
    }


def _described(document: tuple[str, str] | None) -> str:
    return "missing" if document is None else "of {} with hash {}".format(*document)
