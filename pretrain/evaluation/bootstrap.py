"""How sure a measure of documents is: percentile intervals by a bootstrap over the documents, in one pass.

A resample counts each document a random number of times, Poisson(1), which stands for drawing as many documents with
replacement (Hanley and MacGibbon 2006, "Creating non-parametric bootstrap samples using Poisson frequencies";
Chamandy et al. 2012, "Estimating uncertainty for massive data streams"). Documents are resampled whole, for the tokens
of one depend on one another. The count is a pure function of (seed, document, replicate): no order, rank or pass
matters, and two models that are scored on the same documents are resampled alike without being read side by side.
Shapes: n documents, R replicates.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import xxhash

from pretrain.evaluation.record import DocumentScore
from pretrain.evaluation.score import LEVEL, Score, Unit

REPLICATES = 1000
SEED = 0

CHUNK_DOCUMENTS = 256  # whose weights stay in a core's cache
NATS_UNIT = 2.0**-16  # nats are rounded to it in resamples, whose sums are then exact whole numbers, in any order
EXACT_BITS = 64  # of the fraction of the sum itself, which holds every bit of a document's nats above 2**-11
FIELDS = ("nats", "tokens", "bytes", "words")


def poisson_thresholds() -> np.ndarray:
    """(K,) uint32: a uniform 32-bit number is the Poisson(1) variate k if it is at least so many of them."""
    below = itertools.accumulate(math.exp(-1) / math.factorial(k) for k in itertools.count())
    scaled = itertools.takewhile(lambda bound: bound < 2**32, (round(2**32 * share) for share in below))
    return np.array(list(scaled), dtype=np.uint32)


def weights(seed: int, indices: np.ndarray, replicates: int) -> np.ndarray:
    """How often each document counts in each resample, (n, R) uint8: Poisson(1), independent over both.

    `indices`: (n,) of the documents. Each document's row is a SplitMix64 sequence (Steele, Lea and Flood 2014) from a
    state of its own, a word for two replicates.
    """
    states = _mix(indices.astype(np.uint64) * _GAMMA + _mix(np.array([seed], dtype=np.uint64) + _GAMMA))
    steps = np.arange(1, (replicates + 1) // 2 + 1, dtype=np.uint64) * _GAMMA
    words = _mix(states[:, None] + steps[None, :])
    uniform = words.astype("<u8", copy=False).view("<u4")[:, :replicates]
    counts = np.zeros(uniform.shape, dtype=np.uint8)
    for bound in poisson_thresholds():
        counts += uniform >= bound
    return counts


_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd


def _mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, in place: a bijection whose every output bit depends on every input bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(31)
    return words


@dataclass(frozen=True)
class Sums:
    """What some documents add up to: as they are, and in each resample, (len(FIELDS), R) fp64."""

    score: Score
    resampled: np.ndarray

    @classmethod
    def total(cls, parts: Iterable["Sums"]) -> "Sums":
        """Of at least one."""
        parts = list(parts)
        return cls(Score.sum([part.score for part in parts]), np.sum([part.resampled for part in parts], axis=0))

    def nats_per(self, unit: Unit) -> np.ndarray:
        """(R,): of each resample, NaN in one that has none of the unit."""
        counts = self.resampled[FIELDS.index(unit)]
        return np.divide(self.resampled[0], counts, out=np.full_like(counts, np.nan), where=counts > 0)


@dataclass(frozen=True)
class Resampled:
    """The sums of each domain, in the order of their first documents.

    identity: of the documents, the same for the same set of (index, domain, text) in any order.
    """

    by_domain: Mapping[str, Sums]
    identity: int

    @property
    def whole(self) -> Sums:
        return Sums.total(self.by_domain.values())


def resample(documents: Iterable[DocumentScore], replicates: int = REPLICATES, seed: int = SEED) -> Resampled:
    """Add up the documents and their resamples in one pass, in memory of R times the number of domains."""
    adders: dict[str, _Adder] = {}
    identity = 0
    remaining = iter(documents)
    while chunk := list(itertools.islice(remaining, CHUNK_DOCUMENTS)):
        by_domain: dict[str, list[DocumentScore]] = {}
        for document in chunk:
            by_domain.setdefault(document.domain, []).append(document)
            about = f"{document.index} {document.text_xxh3} {document.domain}"
            identity += xxhash.xxh3_128_intdigest(about.encode("utf-8", "surrogatepass"))  # file names may have those
        for name, found in by_domain.items():
            adders.setdefault(name, _Adder(replicates, seed)).add(found)
    ordered = sorted(adders.items(), key=lambda item: item[1].first)
    return Resampled({name: adder.sums() for name, adder in ordered}, identity % 2**128)


class _Adder:
    """The sums of one domain while they grow."""

    def __init__(self, replicates: int, seed: int) -> None:
        self.replicates, self.seed = replicates, seed
        self.first: float = math.inf  # the index of its first document
        self.nats = 0  # in units of 2**-EXACT_BITS
        self.counts = np.zeros(4, dtype=np.int64)  # tokens, bytes, words, documents
        self.resampled = np.zeros((len(FIELDS), replicates))

    def add(self, documents: list[DocumentScore]) -> None:
        self.first = min(self.first, *(document.index for document in documents))
        self.nats += sum(int(math.ldexp(document.nats, EXACT_BITS)) for document in documents)
        counts = np.array([(document.tokens, document.bytes, document.words) for document in documents], dtype=np.int64)
        self.counts += (*counts.sum(axis=0), len(documents))
        nats = np.rint(np.array([document.nats for document in documents]) / NATS_UNIT)
        indices = np.array([document.index for document in documents])
        values = np.column_stack([nats, counts]).T
        self.resampled += values @ weights(self.seed, indices, self.replicates).astype(np.float64)

    def sums(self) -> Sums:
        tokens, text_bytes, words, documents = self.counts.tolist()
        score = Score(self.nats / 2**EXACT_BITS, tokens, text_bytes, words, documents)
        units = np.array([NATS_UNIT, 1.0, 1.0, 1.0])
        return Sums(score, self.resampled * units[:, None])


def percentiles(replicates: np.ndarray, level: float = LEVEL) -> tuple[float, float] | None:
    """The interval that leaves out (1 - level) / 2 of the replicates (R,) at each end; None if there are none.

    NaN, of resamples that are empty, is no replicate.
    """
    known = replicates[~np.isnan(replicates)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
