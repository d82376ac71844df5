"""Duplicates across a corpus of any size in bounded memory: which documents have an earlier one that is as good.

A document is removed if an earlier one (order of the units, then order in the unit) has the same text, or if, among
the documents that share a band with it, the first or the one right before it has an estimated Jaccard similarity of at
least the threshold. So the first document of any chain of duplicates stays, no bucket is compared pair by pair, and
what is removed depends on the sketches and their order alone.

Locality-sensitive hashing (Leskovec, Rajaraman and Ullman, "Mining of massive datasets", section 3.4) is done one
column of keys at a time, and one range of its values at a time where a column does not fit into memory. Such a
partition is a pure function of the sketch files, so that partitions may be found by any process in any order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_pipeline.curation.config import CurationConfig
from data_pipeline.curation.sketch import Sketcher
from data_pipeline.curation.sketch_file import HASH_COLUMN, SketchFile
from data_pipeline.shards import AtomicFile

KEPT, EXACT, NEAR = 0, 1, 2
"""Codes of what becomes of a document."""
DOCUMENT_BYTES = 96
"""Of memory for each document of a partition while its keys are sorted, measured; half of it is for those to come."""
PAIRS_PER_STEP = 1 << 13
OPEN_FILES = 64
DEFAULT_MEMORY_BYTES = 2 << 30


@dataclass(frozen=True)
class Partition:
    """The documents whose keys in a column lie in one of `parts` equal ranges."""

    column: int
    """A band, or HASH_COLUMN."""
    part: int
    parts: int

    @property
    def name(self) -> str:
        column = "hash" if self.column == HASH_COLUMN else f"band{self.column:03}"
        return f"{column}_{self.part:05}_of_{self.parts:05}"

    def holds(self, keys: np.ndarray) -> np.ndarray:
        low = np.uint64((self.part << 64) // self.parts)
        high = np.uint64(((self.part + 1 << 64) // self.parts) - 1)
        return (keys >= low) & (keys <= high)


class DuplicateSearch:
    """The search among the documents of `units`, files of sketches in the order that decides who was first.

    `find` each partition, here or in several processes, then ask for `removed`. Findings are kept in `folder`, so that
    a search that was killed goes on.

    Raises:
        ValueError: a file of sketches is torn, or was made for another curation.
    """

    def __init__(
        self, config: CurationConfig, units: Sequence[Path], folder: Path, memory_bytes: int = DEFAULT_MEMORY_BYTES
    ) -> None:
        self._config = config
        self._units = [Path(unit) for unit in units]
        self._folder = folder
        self._first = np.zeros(len(self._units) + 1, np.int64)
        """Number of each unit's first document among all; at the end, how many there are."""
        sketcher = Sketcher.of(config)
        for unit, path in enumerate(self._units):
            file = SketchFile(path)
            if (file.permutations, file.bands) != (sketcher.permutations, sketcher.bands):
                raise ValueError(
                    f"{path} was made for {file.permutations} permutations in {file.bands}, but the curation asks for "
                    f"{sketcher.permutations} in {sketcher.bands}: remove the unfinished job's folder and start again"
                )
            self._first[unit + 1] = self._first[unit] + file.documents
        self._buffer_documents = max(1, memory_bytes // DOCUMENT_BYTES)
        parts = max(1, -(-self.documents // self._buffer_documents))
        columns = [*([HASH_COLUMN] if config.exact_duplicates else []), *range(sketcher.bands.count)]
        self.partitions = tuple(Partition(column, part, parts) for column in columns for part in range(parts))
        self._open = lru_cache(maxsize=OPEN_FILES)(lambda unit: SketchFile(self._units[unit]))

    @property
    def documents(self) -> int:
        return int(self._first[-1])

    def is_found(self, partition: Partition) -> bool:
        return self._findings(partition).exists()

    def find(self, partition: Partition) -> None:
        """Find what goes by this partition and keep it, unless that was done before."""
        if self.is_found(partition):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        file = AtomicFile(self._findings(partition))
        try:
            for documents in self._duplicates(partition):
                file.write(np.sort(documents).astype("<i8").tobytes())
            file.commit()
        except BaseException:
            file.discard()
            raise

    def removed(self, unit: int) -> np.ndarray:
        """Code of each document of a unit, (documents,) uint8. Every partition must be found.

        A document that has both kinds of duplicate counts as EXACT.
        """
        start, end = self._first[unit], self._first[unit + 1]
        codes = np.full(end - start, KEPT, np.uint8)
        # Bands first, so that the hashes have the last word.
        for partition in reversed(self.partitions):
            path = self._findings(partition)
            if not path.stat().st_size:
                continue
            found = np.memmap(path, "<i8", "r")
            inside = found[slice(*np.searchsorted(found, [start, end]))]
            codes[inside - start] = EXACT if partition.column == HASH_COLUMN else NEAR
        return codes

    def _findings(self, partition: Partition) -> Path:
        return self._folder / f"{partition.name}.duplicates"

    def _duplicates(self, partition: Partition) -> Iterator[np.ndarray]:
        """Numbers of the documents that go, (n,) int64; each array holds later ones than those before.

        Keys are gathered until the memory is full and then folded into what is known of each key: its first and its
        latest document. So not even a key that half of all documents share takes more.
        """
        known = _Known(np.empty(0, np.uint64), np.empty(0, np.int64))
        for keys, documents in self._gathered(partition):
            known, pairs = _fold(known, keys, documents)
            yield self._confirmed(pairs, partition)

    def _gathered(self, partition: Partition) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Keys (n,) uint64 and numbers (n,) int64 of the documents of a partition, about half the memory at a time."""
        keys: list[np.ndarray] = []
        documents: list[np.ndarray] = []
        gathered = 0
        for unit, first in enumerate(self._first[:-1]):
            for block in SketchFile(self._units[unit]).keys(partition.column):
                places = np.flatnonzero(partition.holds(block))
                keys.append(block[places])
                documents.append(places + first)
                first += len(block)
                gathered += len(places)
                if gathered >= self._buffer_documents // 2:
                    yield np.concatenate(keys), np.concatenate(documents)
                    keys, documents, gathered = [], [], 0
        if gathered:
            yield np.concatenate(keys), np.concatenate(documents)

    def _confirmed(self, pairs: "_Pairs", partition: Partition) -> np.ndarray:
        """The later documents of those pairs that are duplicates indeed."""
        confirmed = [np.empty(0, np.int64)]
        for start in range(0, len(pairs.document), PAIRS_PER_STEP):
            step = slice(start, start + PAIRS_PER_STEP)
            document, first, previous = pairs.document[step], pairs.first[step], pairs.previous[step]
            same = self._same(document, first, partition)
            open_ = np.flatnonzero(~same & (previous != first))
            same[open_] = self._same(document[open_], previous[open_], partition)
            confirmed.append(document[same])
        return np.concatenate(confirmed)

    def _same(self, one: np.ndarray, other: np.ndarray, partition: Partition) -> np.ndarray:
        near = self._config.near_duplicates
        if partition.column == HASH_COLUMN:
            return (self._rows(one, "hashes") == self._rows(other, "hashes")).all(axis=1)
        assert near is not None
        agreement = (self._rows(one, "signatures") == self._rows(other, "signatures")).mean(axis=1)
        return agreement >= near.threshold

    def _rows(self, documents: np.ndarray, column: str) -> np.ndarray:
        """Hashes or signatures of documents of any units."""
        units = np.searchsorted(self._first, documents, side="right") - 1
        pieces, places = [], []
        for unit in np.unique(units):
            inside = np.flatnonzero(units == unit)
            places.append(inside)
            pieces.append(getattr(self._open(int(unit)), column)(documents[inside] - self._first[unit]))
        if not pieces:
            return np.empty((0, 1), np.uint64)
        rows = np.empty((len(documents), pieces[0].shape[1]), pieces[0].dtype)
        for place, piece in zip(places, pieces, strict=True):
            rows[place] = piece
        return rows


@dataclass(frozen=True)
class _Known:
    """Of each key that occurred, the first document and the latest, as one or two entries in the order of the keys."""

    keys: np.ndarray
    documents: np.ndarray


@dataclass(frozen=True)
class _Pairs:
    """Documents with another before them of the same key: (n,) the document, the key's first, and the one before."""

    document: np.ndarray
    first: np.ndarray
    previous: np.ndarray


def _fold(known: _Known, keys: np.ndarray, documents: np.ndarray) -> tuple[_Known, _Pairs]:
    """Put more documents, all later than those known, to their keys."""
    is_new = np.zeros(len(known.keys) + len(keys), bool)
    is_new[len(known.keys) :] = True
    keys = np.concatenate([known.keys, keys])
    documents = np.concatenate([known.documents, documents])
    order = np.argsort(keys, kind="stable")
    keys, documents, is_new = keys[order], documents[order], is_new[order]
    begins = np.ones(len(keys), bool)
    begins[1:] = keys[1:] != keys[:-1]
    ends = np.roll(begins, -1)
    later = np.flatnonzero(is_new & ~begins)
    group = np.cumsum(begins) - 1
    pairs = _Pairs(documents[later], documents[begins][group[later]], documents[later - 1])
    stays = begins | ends
    return _Known(keys[stays], documents[stays]), pairs
