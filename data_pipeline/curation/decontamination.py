"""Documents that contain passages of evaluation sets: runs of words in common.

Source: Brown et al. 2020 ("Language models are few-shot learners", appendix C), where words are lower-case and without
punctuation, and runs have 13. There the surroundings of the run are cut out; here the document goes.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.curation.words import ngram_hashes, word_hashes
from data_pipeline.shards import write_atomically

HASHES_NAME = "ngrams.u64"
SETS_NAME = "ngrams.set"
INDEX_NAME = "ngrams.json"


@dataclass(frozen=True)
class SetCounts:
    """What was taken from an evaluation set."""

    texts: int
    too_short: int
    """Texts of fewer words than a run has: documents that contain them are not found."""


class EvaluationNgrams:
    """The runs of words of some evaluation sets as sorted hashes, memory-mapped: processes of a node share them.

    Raises:
        OSError: the folder does not hold them.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / INDEX_NAME).read_text())
        self.ngram: int = index["ngram"]
        self.counts = {name: SetCounts(**counts) for name, counts in index["sets"].items()}
        """By the name of the set."""
        self._names = list(self.counts)
        # As plain arrays: indexing a memmap object is slow.
        self._hashes = np.asarray(np.memmap(folder / HASHES_NAME, "<u8", "r"))
        self._sets = np.asarray(np.memmap(folder / SETS_NAME, "<u2", "r"))

    def find(self, text: str) -> str | None:
        """The name of a set that has a run of words in common with the text: the first of those there are."""
        hashes = ngram_hashes(word_hashes(text), self.ngram)
        # Sorted, they are looked up several times as fast: neighbours lie close in memory.
        hashes.sort()
        places = np.searchsorted(self._hashes, hashes)
        inside = places < len(self._hashes)
        hits = places[inside][self._hashes[places[inside]] == hashes[inside]]
        return self._names[int(self._sets[hits].min())] if len(hits) else None


def collect_ngrams(sets: Mapping[str, Iterable[str]], ngram: int, folder: Path) -> EvaluationNgrams:
    """Gather the runs of `ngram` words of the texts of each evaluation set by name, and keep them in `folder`.

    Raises:
        ValueError: no text of a set has so many words.
    """
    names = list(sets)
    assert len(names) < 1 << 16
    counts: dict[str, SetCounts] = {}
    hashes_of: list[np.ndarray] = []
    for name, texts in sets.items():
        runs = [ngram_hashes(word_hashes(text), ngram) for text in texts]
        counts[name] = SetCounts(len(runs), sum(not len(run) for run in runs))
        if counts[name].texts == counts[name].too_short:
            raise ValueError(
                f"evaluation set {name} has no text of {ngram} words or more, so nothing can be found by it: "
                "lower decontaminate.ngram or take the set out"
            )
        hashes_of.append(np.unique(np.concatenate(runs)))
    set_of = np.repeat(np.arange(len(names), dtype="<u2"), [len(hashes) for hashes in hashes_of])
    # The first occurrence is that of the first set.
    hashes, first = np.unique(np.concatenate(hashes_of), return_index=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / HASHES_NAME, hashes.astype("<u8").tobytes())
    write_atomically(folder / SETS_NAME, set_of[first].tobytes())
    index = {"ngram": ngram, "sets": {name: vars(count) for name, count in counts.items()}}
    write_atomically(folder / INDEX_NAME, json.dumps(index, indent=1).encode())
    return EvaluationNgrams(folder)
