"""What went into a preparation and what came out of it: documents and bytes by input and by rule, and histograms."""

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

LENGTH_BINS = 32
"""Bin b of tokens a document holds lengths of [2 ** b, 2 ** (b + 1))."""
RATIO_BINS = 64
RATIO_WIDTH = 0.25
"""Bin b of bytes a token holds ratios of [b, b + 1) * RATIO_WIDTH; the last one all above, too."""


@dataclass
class Tally:
    """So many documents, and the UTF-8 bytes of their texts."""

    documents: int = 0
    text_bytes: int = 0

    def add(self, documents: int, text_bytes: int) -> None:
        self.documents += documents
        self.text_bytes += text_bytes


@dataclass
class InputCounts:
    """Of one input of the corpus. What was read is what was kept, removed and trimmed, document by document."""

    read: Tally = field(default_factory=Tally)
    removed: dict[str, Tally] = field(default_factory=dict)
    """By the rule that removed them, the first that did."""
    trimmed_bytes: int = 0
    """Taken out of documents that were kept, by rules on lines."""
    kept: Tally = field(default_factory=Tally)
    tokens: int = 0
    """Of the documents that were kept, with each one's BOS and EOS."""
    quarantined: int = 0
    skipped_files: int = 0
    lengths: list[int] = field(default_factory=lambda: [0] * LENGTH_BINS)
    """Documents by their tokens: see LENGTH_BINS."""
    ratios: list[int] = field(default_factory=lambda: [0] * RATIO_BINS)
    """Documents by their bytes a token: see RATIO_BINS."""

    def remove(self, rule: str, documents: int, text_bytes: int) -> None:
        """A rule has removed documents."""
        self.removed.setdefault(rule, Tally()).add(documents, text_bytes)

    def keep(self, lengths: np.ndarray, text_bytes: np.ndarray) -> None:
        """These documents are in the data folder: their tokens `(n,)` and their UTF-8 bytes `(n,)`."""
        if not len(lengths):
            return
        self.kept.add(len(lengths), int(text_bytes.sum(dtype=np.int64)))
        self.tokens += int(lengths.sum(dtype=np.int64))
        bins = np.frexp(lengths.astype(np.float64))[1] - 1  # frexp's exponent is floor(log2) + 1, exactly
        self._count(self.lengths, bins)
        self._count(self.ratios, np.minimum(text_bytes / (lengths * RATIO_WIDTH), RATIO_BINS - 1).astype(np.int64))

    @staticmethod
    def _count(histogram: list[int], bins: np.ndarray) -> None:
        counts = np.bincount(bins, minlength=len(histogram)).tolist()
        histogram[:] = [a + b for a, b in zip(histogram, counts, strict=True)]

    def merge(self, other: Self) -> None:
        """Add another part's counts to these."""
        self.read.add(other.read.documents, other.read.text_bytes)
        for rule, tally in other.removed.items():
            self.remove(rule, tally.documents, tally.text_bytes)
        self.trimmed_bytes += other.trimmed_bytes
        self.kept.add(other.kept.documents, other.kept.text_bytes)
        self.tokens += other.tokens
        self.quarantined += other.quarantined
        self.skipped_files += other.skipped_files
        self.lengths = [a + b for a, b in zip(self.lengths, other.lengths, strict=True)]
        self.ratios = [a + b for a, b in zip(self.ratios, other.ratios, strict=True)]

    def check(self) -> None:
        """Nothing may be lost on the way: each document that was read was kept, or removed by a rule."""
        removed = Tally(
            sum(tally.documents for tally in self.removed.values()),
            sum(tally.text_bytes for tally in self.removed.values()),
        )
        assert self.read.documents == self.kept.documents + removed.documents
        assert self.read.text_bytes == self.kept.text_bytes + removed.text_bytes + self.trimmed_bytes
        assert sum(self.lengths) == sum(self.ratios) == self.kept.documents

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        removed = {rule: Tally(**tally) for rule, tally in tree["removed"].items()}
        return cls(**(tree | {"read": Tally(**tree["read"]), "kept": Tally(**tree["kept"]), "removed": removed}))


@dataclass
class Counts:
    """By the name of the input."""

    inputs: defaultdict[str, InputCounts] = field(default_factory=lambda: defaultdict(InputCounts))

    def merge(self, other: Self) -> None:
        """Add another part's counts to these."""
        for name, counts in other.inputs.items():
            self.inputs[name].merge(counts)

    @property
    def total(self) -> InputCounts:
        """All inputs together."""
        total = InputCounts()
        for counts in self.inputs.values():
            total.merge(counts)
        return total

    def to_json(self) -> dict[str, Any]:
        return {name: asdict(counts) for name, counts in self.inputs.items()}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        counts = cls()
        counts.inputs.update({name: InputCounts.from_json(part) for name, part in tree.items()})
        return counts
