import random
from functools import lru_cache

import numpy as np
import pytest
import xxhash

from data_pipeline.curation.config import CurationConfig, NearDuplicatesConfig
from data_pipeline.curation.sketch import Bands, Sketcher, best_bands, minhash
from data_pipeline.curation.words import mixed, ngram_hashes, word_hashes
from tests.unit.data_pipeline.curation.conftest import edited, written

NEAR = CurationConfig(near_duplicates=NearDuplicatesConfig())


@lru_cache(maxsize=1000)
def ngrams(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[place : place + 5]) for place in range(len(words) - 4)}


def similarity(one: str, other: str) -> float:
    """The Jaccard similarity by its definition."""
    return len(ngrams(one) & ngrams(other)) / len(ngrams(one) | ngrams(other))


def test_the_hash_is_of_the_exact_text() -> None:
    sketcher = Sketcher.of(CurationConfig(exact_duplicates=True))
    sketch = sketcher.sketch("Grüße")
    assert sketch.hash == xxhash.xxh3_128_digest("Grüße".encode())
    assert len(sketch.signature) == 0
    assert sketcher.sketch("Grüße ").hash != sketch.hash


def test_signatures_estimate_similarity_as_well_as_theory_says() -> None:
    """The mean error is 0 and its deviation sqrt(s (1 - s) / permutations): the hash functions act independently."""
    generator = random.Random(1)
    sketcher = Sketcher.of(NEAR)
    errors = []
    for edits in range(1, 15):
        for _ in range(25):
            words = written(generator, 200)
            one, other = " ".join(words), " ".join(edited(generator, words, edits))
            exact = similarity(one, other)
            estimate = (sketcher.sketch(one).signature == sketcher.sketch(other).signature).mean()
            errors.append((estimate - exact) / np.sqrt(exact * (1 - exact) / 128))
    assert abs(np.mean(errors)) < 4 / np.sqrt(len(errors))
    assert 0.85 < np.std(errors) < 1.15


def test_signatures_agree_with_datasketch_on_what_is_similar() -> None:
    datasketch = pytest.importorskip("datasketch")
    generator = random.Random(2)
    for edits in (0, 2, 8, 14):
        words = written(generator, 200)
        items = [ngram_hashes(word_hashes(" ".join(text)), 5) for text in (words, edited(generator, words, edits))]
        theirs = []
        for hashes in items:
            theirs.append(datasketch.MinHash(1024, hashfunc=lambda item: item & 0xFFFFFFFF))
            theirs[-1].update_batch(hashes.tolist())
        ours = (minhash(items[0], 1024) == minhash(items[1], 1024)).mean()
        assert ours == pytest.approx(theirs[0].jaccard(theirs[1]), abs=0.08)


def test_layout_and_case_do_not_change_a_signature_but_do_change_the_hash() -> None:
    sketcher = Sketcher.of(NEAR)
    one = sketcher.sketch("The river was wide, and the other bank was far away.")
    other = sketcher.sketch("the river was wide and\n\nTHE OTHER BANK was (far away)")
    assert np.array_equal(one.signature, other.signature)
    assert one.hash != other.hash


@pytest.mark.parametrize("texts", [("", "..."), ("one two", "two one"), ("!", "?")])
def test_short_documents_are_like_their_copies_only(texts: tuple[str, str]) -> None:
    one, other = (Sketcher.of(NEAR).sketch(text).signature for text in texts)
    assert (one == other).mean() < 0.1
    assert np.array_equal(one, Sketcher.of(NEAR).sketch(texts[0]).signature)


def test_a_long_document_has_the_signature_of_all_its_parts() -> None:
    items = np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64)
    parts = [minhash(part, 64) for part in np.array_split(items, 7)]
    assert np.array_equal(minhash(items, 64), np.minimum.reduce(parts))


def test_signatures_do_not_change_between_versions() -> None:
    """They are kept on disk by an unfinished job."""
    signature = minhash(mixed(np.arange(1, 100, dtype=np.uint64)), 128)
    assert xxhash.xxh3_64_hexdigest(signature.tobytes()) == "93c051677223fd8f"


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_bands_are_the_best_by_the_errors_of_datasketch(threshold: float) -> None:
    lsh = pytest.importorskip("datasketch.lsh")
    bands = best_bands(64, threshold)
    theirs = Bands(*lsh._optimal_param(threshold, 64, 0.1, 0.9))
    similarity = np.linspace(0, 1, 2001)
    above = similarity >= threshold

    def error(bands: Bands) -> float:
        found = bands.found(similarity)
        return 0.9 * (1 - found[above]).sum() + 0.1 * found[~above].sum()

    assert error(bands) <= 1.01 * error(theirs)


def test_documents_share_a_band_exactly_where_its_rows_agree() -> None:
    generator = np.random.default_rng(0)
    signatures = generator.integers(0, 3, (200, 7), dtype=np.uint32)
    bands = Bands(count=3, rows=2)
    keys = bands.keys(signatures)
    assert keys.shape == (3, 200)
    for band in range(3):
        rows = signatures[:, 2 * band : 2 * band + 2]
        for other in range(200):
            assert np.array_equal(keys[band] == keys[band, other], (rows == rows[other]).all(axis=1))
