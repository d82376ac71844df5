"""What of a document is enough to find its duplicates: a hash of the text and a MinHash signature of its words.

The Jaccard similarity of two documents is that of their sets of word n-grams. A signature holds, for each of P hash
functions, the smallest value over the set; two signatures agree at a place with the probability of the similarity
(Broder 1997, "On the resemblance and containment of documents"). The hash functions are h_i(x) = a_i x mod 2^64 with
odd a_i, of which the upper half is kept (multiply-shift, Dietzfelbinger et al. 1997): x is a hash already.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash

from data_pipeline.curation.config import CurationConfig
from data_pipeline.curation.words import MULTIPLIER, mixed, ngram_hashes, word_hashes

HASH_BYTES = 16
NGRAMS_PER_STEP = 2048
"""So that the hash values of a step, P of them for each n-gram, stay in the processor's cache."""
MISSED_WEIGHT = 0.9
"""Missing a pair is worse than comparing one in vain: what is found by a band is compared by signature."""


@dataclass(frozen=True)
class Sketch:
    """Of one document."""

    hash: bytes
    """xxh3-128 of the text in UTF-8."""
    signature: np.ndarray
    """(permutations,) uint32; empty where near duplicates are not asked for."""


@dataclass(frozen=True)
class Bands:
    """How a signature is cut for locality-sensitive hashing: `count` bands of `rows` numbers each.

    Two documents of similarity s share a band with probability 1 - (1 - s^rows)^count (Leskovec, Rajaraman and Ullman,
    "Mining of massive datasets", section 3.4).
    """

    count: int
    rows: int

    def found(self, similarity: np.ndarray) -> np.ndarray:
        """Probability that a pair of this similarity is compared at all."""
        return 1 - (1 - similarity**self.rows) ** self.count

    def keys(self, signatures: np.ndarray) -> np.ndarray:
        """One number for each band, (bands, documents) uint64, of signatures (documents, permutations) uint32."""
        rows = signatures[:, : self.count * self.rows].reshape(len(signatures), self.count, self.rows)
        keys = np.zeros((self.count, len(signatures)), np.uint64)
        for row in range(self.rows):
            keys *= MULTIPLIER
            keys += rows[:, :, row].T
        return mixed(keys)


@dataclass(frozen=True)
class Sketcher:
    """Makes sketches as a curation asks for them."""

    permutations: int
    ngram: int
    bands: Bands

    @classmethod
    def of(cls, config: CurationConfig) -> "Sketcher":
        near = config.near_duplicates
        if near is None:
            return cls(0, 1, Bands(0, 0))
        return cls(near.permutations, near.ngram, best_bands(near.permutations, near.threshold))

    def sketch(self, text: str) -> Sketch:
        content = text.encode()
        digest = xxhash.xxh3_128_digest(content)
        if not self.permutations:
            return Sketch(digest, np.empty(0, np.uint32))
        words = word_hashes(text)
        ngrams = ngram_hashes(words, min(self.ngram, len(words))) if len(words) else np.empty(0, np.uint64)
        if not len(ngrams):
            # Nothing to compare but the text itself: it is like its copies only.
            ngrams = np.array([xxhash.xxh3_64_intdigest(content)], np.uint64)
        return Sketch(digest, minhash(ngrams, self.permutations))


def minhash(items: np.ndarray, permutations: int) -> np.ndarray:
    """The MinHash signature, (permutations,) uint32, of a set of hashed items (items,) uint64; at least one."""
    multipliers = _multipliers(permutations)
    smallest = np.full(permutations, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(items), NGRAMS_PER_STEP):
        values = multipliers * items[start : start + NGRAMS_PER_STEP]
        np.minimum(smallest, values.min(axis=1), out=smallest)
    return (smallest >> np.uint64(32)).astype(np.uint32)


@lru_cache(maxsize=4)
def best_bands(permutations: int, threshold: float) -> Bands:
    """The bands that err least: pairs above the threshold that are missed, and pairs below it that are compared.

    Both are integrated over the similarity, as by Zhu et al. 2016 ("LSH Ensemble", equations 22 to 24).
    """
    similarity = (np.arange(1000) + 0.5) / 1000
    above = similarity >= threshold

    def error(bands: Bands) -> float:
        found = bands.found(similarity)
        return float(MISSED_WEIGHT * (1 - found[above]).sum() + (1 - MISSED_WEIGHT) * found[~above].sum())

    cuts = [Bands(count, rows) for rows in range(1, permutations + 1) for count in range(1, permutations // rows + 1)]
    return min(cuts, key=error)


@lru_cache(maxsize=4)
def _multipliers(permutations: int) -> np.ndarray:
    """Odd numbers, (permutations, 1): the first of SplitMix64's sequence."""
    counter = np.arange(1, permutations + 1, dtype=np.uint64) * MULTIPLIER
    return (mixed(counter) | np.uint64(1))[:, None]
