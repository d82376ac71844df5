import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.curation import duplicates, sketch_file
from data_pipeline.curation.config import CurationConfig, NearDuplicatesConfig
from data_pipeline.curation.duplicates import (
    DEFAULT_MEMORY_BYTES,
    DOCUMENT_BYTES,
    EXACT,
    KEPT,
    NEAR,
    DuplicateSearch,
)
from data_pipeline.curation.sketch import Bands, Sketch, Sketcher
from data_pipeline.curation.sketch_file import SketchWriter
from tests.unit.data_pipeline.curation.conftest import edited, written
from tests.unit.data_pipeline.curation.test_sketch import similarity

BOTH = CurationConfig(exact_duplicates=True, near_duplicates=NearDuplicatesConfig())
ONLY_EXACT = CurationConfig(exact_duplicates=True)
ONLY_NEAR = CurationConfig(near_duplicates=NearDuplicatesConfig())


def write_units(folder: Path, texts: list[str], units: int, config: CurationConfig = BOTH) -> list[Path]:
    folder.mkdir(exist_ok=True)
    sketcher = Sketcher.of(config)
    paths = []
    for unit, part in enumerate(np.array_split(np.array(texts, dtype=object), units)):
        paths.append(folder / f"unit{unit}")
        with SketchWriter(paths[-1], sketcher.permutations, sketcher.bands) as writer:
            for text in part:
                writer.append(sketcher.sketch(text))
    return paths


def found_codes(
    config: CurationConfig, units: list[Path], folder: Path, memory_bytes: int = DEFAULT_MEMORY_BYTES
) -> list[np.ndarray]:
    """The codes of each unit's documents, after a search in one process."""
    search = DuplicateSearch(config, units, folder, memory_bytes)
    for partition in search.partitions:
        search.find(partition)
    return [search.removed(unit) for unit in range(len(units))]


def expected(texts: list[str], config: CurationConfig) -> np.ndarray:
    """The rule as it is stated, with dictionaries."""
    sketcher = Sketcher.of(config)
    sketches = [sketcher.sketch(text) for text in texts]
    codes = np.full(len(texts), KEPT)
    if config.near_duplicates is not None:
        signatures = np.array([sketch.signature for sketch in sketches])
        for keys in sketcher.bands.keys(signatures):
            first: dict[int, int] = {}
            latest: dict[int, int] = {}
            for number, key in enumerate(keys.tolist()):
                for other in {first.setdefault(key, number), latest.get(key, number)} - {number}:
                    if (signatures[number] == signatures[other]).mean() >= config.near_duplicates.threshold:
                        codes[number] = NEAR
                latest[key] = number
    if config.exact_duplicates:
        seen: set[bytes] = set()
        for number, sketch in enumerate(sketches):
            if sketch.hash in seen:
                codes[number] = EXACT
            seen.add(sketch.hash)
    return codes


@pytest.mark.parametrize("config", [BOTH, ONLY_EXACT, ONLY_NEAR], ids=["both", "exact", "near"])
def test_what_is_removed_is_what_the_rule_says(tmp_path: Path, documents: list[str], config: CurationConfig) -> None:
    codes = found_codes(config, write_units(tmp_path, documents, 3, config), tmp_path / "found")
    assert [code.dtype for code in codes] == [np.uint8] * 3
    assert np.array_equal(np.concatenate(codes), expected(documents, config))


def test_all_copies_and_nearly_all_edited_copies_are_found_and_no_others(tmp_path: Path, documents: list[str]) -> None:
    (codes,) = found_codes(BOTH, write_units(tmp_path, documents, 1), tmp_path / "found")
    near = missed = 0
    for number, text in enumerate(documents):
        similarities = [similarity(text, earlier) for earlier in documents[:number]]
        if text in documents[:number]:
            assert codes[number] == EXACT
        elif max(similarities, default=0) >= 0.9:
            near += 1
            missed += codes[number] != NEAR
        elif max(similarities, default=0) < 0.7:
            assert codes[number] == KEPT
    assert near > 40
    assert missed / near < 0.05


def test_units_memory_and_the_order_of_the_search_do_not_matter(tmp_path: Path, documents: list[str]) -> None:
    (codes,) = found_codes(BOTH, write_units(tmp_path / "one", documents, 1), tmp_path / "found")
    units = write_units(tmp_path / "many", documents, 7)
    for round_, memory_documents in enumerate([1000, 80, 25]):
        folder = tmp_path / f"found{round_}"
        search = DuplicateSearch(BOTH, units, folder, memory_documents * DOCUMENT_BYTES)
        assert len({partition.name for partition in search.partitions}) == len(search.partitions)
        assert search.partitions[0].parts == -(-len(documents) // memory_documents)
        partitions = list(search.partitions)
        random.Random(round_).shuffle(partitions)
        for partition in partitions:
            # Each by a search of its own, as in another process.
            DuplicateSearch(BOTH, units, folder, memory_documents * DOCUMENT_BYTES).find(partition)
        assert np.array_equal(np.concatenate([search.removed(unit) for unit in range(7)]), codes)


def test_the_first_of_a_chain_stays(tmp_path: Path) -> None:
    """Each is like the one before, but the last is not like the first."""
    generator = random.Random(3)
    chain = [written(generator, 300)]
    for _ in range(12):
        chain.append(edited(generator, chain[-1], 2))
    texts = [" ".join(words) for words in chain]
    assert similarity(texts[0], texts[-1]) < 0.7
    units = write_units(tmp_path, texts, len(texts))
    for memory_documents in (100, 4):
        folder = tmp_path / f"found{memory_documents}"
        codes = np.concatenate(found_codes(BOTH, units, folder, memory_documents * DOCUMENT_BYTES))
        assert codes[0] == KEPT
        assert (codes[1:] == NEAR).mean() > 0.8
        assert np.array_equal(codes, expected(texts, BOTH))


@pytest.mark.parametrize("memory_documents", [100, 2])
def test_a_document_is_compared_with_the_first_of_its_bucket_and_the_one_before(
    tmp_path: Path, memory_documents: int
) -> None:
    sketcher = Sketcher.of(ONLY_NEAR)
    generator = np.random.default_rng(0)
    rows = sketcher.bands.rows
    originals = {name: generator.integers(0, 2**32, sketcher.permutations, dtype=np.uint32) for name in "ABC"}

    def signature(name: str) -> np.ndarray:
        """All share the first band; a copy of an original, such as b of B, has a difference in each of the others."""
        copy = originals[name.upper()].copy()
        copy[:rows] = originals["A"][:rows]
        if name.islower():
            copy[rows::rows] = generator.integers(0, 2**32, len(copy[rows::rows]))
        return copy

    units = []
    for number, name in enumerate("ABCbBbacA"):
        units.append(tmp_path / f"unit{number}")
        with SketchWriter(units[-1], sketcher.permutations, sketcher.bands) as writer:
            writer.append(Sketch(generator.bytes(16), signature(name)))
    found = found_codes(ONLY_NEAR, units, tmp_path / "found", memory_documents * DOCUMENT_BYTES)
    assert np.concatenate(found).tolist() == [KEPT, KEPT, KEPT, KEPT, NEAR, NEAR, NEAR, KEPT, NEAR]


def test_a_search_that_was_stopped_goes_on(tmp_path: Path, documents: list[str]) -> None:
    units = write_units(tmp_path, documents, 2)
    search = DuplicateSearch(BOTH, units, tmp_path / "found")
    search.find(search.partitions[0])
    (done,) = (tmp_path / "found").iterdir()
    before = done.stat()
    codes = found_codes(BOTH, units, tmp_path / "found")
    assert done.stat().st_mtime_ns == before.st_mtime_ns
    assert np.array_equal(np.concatenate(codes), expected(documents, BOTH))


def test_equal_halves_of_a_hash_are_no_duplicates(tmp_path: Path) -> None:
    with SketchWriter(tmp_path / "unit", 0, Bands(0, 0)) as writer:
        for hash_ in (b"a" * 16, b"a" * 8 + b"b" * 8, b"a" * 8 + b"b" * 8):
            writer.append(Sketch(hash_, np.empty(0, np.uint32)))
    (codes,) = found_codes(ONLY_EXACT, [tmp_path / "unit"], tmp_path / "found")
    assert codes.tolist() == [KEPT, KEPT, EXACT]


def test_sketches_of_another_curation_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="made for 0 permutations .* asks for 128 .*: remove"):
        DuplicateSearch(BOTH, write_units(tmp_path, ["text"], 1, ONLY_EXACT), tmp_path / "found")


def test_no_documents_have_no_duplicates(tmp_path: Path) -> None:
    codes = found_codes(BOTH, write_units(tmp_path, [], 2), tmp_path / "found")
    assert [code.tolist() for code in codes] == [[], []]


@pytest.mark.parametrize("same", [0.0, 0.5], ids=["all-different", "half-the-same"])
def test_memory_is_bounded_whatever_the_corpus(tmp_path: Path, same: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """80,000 documents with the memory for 20,000; even where half of them share every key."""
    documents, memory_bytes = 80_000, 20_000 * DOCUMENT_BYTES
    # What is read and compared at once comes on top; with the memory of a real search, it is next to nothing.
    monkeypatch.setattr(sketch_file, "BLOCK_DOCUMENTS", 1024)
    monkeypatch.setattr(duplicates, "PAIRS_PER_STEP", 1024)
    generator = np.random.default_rng(0)
    units = []
    copied, copies = generator.bytes(16), 0
    for unit in range(4):
        units.append(tmp_path / f"unit{unit}")
        with SketchWriter(units[-1], 0, Bands(0, 0)) as writer:
            for _ in range(documents // 4):
                hash_ = copied if generator.random() < same else generator.bytes(16)
                copies += hash_ == copied
                writer.append(Sketch(hash_, np.empty(0, np.uint32)))
    search = DuplicateSearch(ONLY_EXACT, units, tmp_path / "found", memory_bytes)
    assert len(search.partitions) == 4
    tracemalloc.start()
    try:
        for partition in search.partitions:
            search.find(partition)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    removed = sum(int((search.removed(unit) == EXACT).sum()) for unit in range(4))
    assert removed == max(0, copies - 1)
    assert peak < memory_bytes
