from pathlib import Path

import numpy as np
import pytest

from data_pipeline.curation import sketch_file
from data_pipeline.curation.sketch import Bands, Sketch
from data_pipeline.curation.sketch_file import HASH_COLUMN, HEADER, SketchFile, SketchWriter


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sketch_file, "BLOCK_DOCUMENTS", 5)


def write(path: Path, documents: int, permutations: int, bands: Bands) -> list[Sketch]:
    generator = np.random.default_rng(documents)
    sketches = [
        Sketch(generator.bytes(16), generator.integers(0, 2**32, permutations, dtype=np.uint32))
        for _ in range(documents)
    ]
    with SketchWriter(path, permutations, bands) as writer:
        for sketch in sketches:
            writer.append(sketch)
    assert writer.documents == documents
    return sketches


@pytest.mark.parametrize("documents", [0, 1, 5, 13])
@pytest.mark.parametrize(("permutations", "bands"), [(0, Bands(0, 0)), (7, Bands(2, 3))])
def test_what_is_written_is_read(tmp_path: Path, documents: int, permutations: int, bands: Bands) -> None:
    sketches = write(tmp_path / "sketches", documents, permutations, bands)
    file = SketchFile(tmp_path / "sketches")
    assert (file.documents, file.permutations, file.bands) == (documents, permutations, bands)
    hashes = np.array([np.frombuffer(sketch.hash, "<u8") for sketch in sketches]).reshape(documents, 2)
    signatures = np.array([sketch.signature for sketch in sketches], np.uint32).reshape(documents, permutations)
    assert np.array_equal(np.concatenate([*file.keys(HASH_COLUMN), []]), hashes[:, 0])
    for band in range(bands.count):
        assert np.array_equal(np.concatenate([*file.keys(band), []]), bands.keys(signatures)[band])
    some = np.random.default_rng(0).permutation(np.repeat(np.arange(documents), 2))
    if documents:
        assert np.array_equal(file.hashes(some), hashes[some])
        assert np.array_equal(file.signatures(some), signatures[some])


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), SketchWriter(tmp_path / "sketches", 0, Bands(0, 0)):
        raise RuntimeError
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [b"", b"SKETCH01", b"something else, and long enough to be a header"])
def test_another_file_is_refused(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "sketches").write_bytes(damage)
    with pytest.raises(ValueError, match="no file of sketches: remove"):
        SketchFile(tmp_path / "sketches")


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "sketches", 3, 7, Bands(2, 3))
    content = (tmp_path / "sketches").read_bytes()
    assert len(content) == HEADER.size + 3 * (16 + 2 * 8 + 7 * 4)
    (tmp_path / "sketches").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="is torn: remove"):
        SketchFile(tmp_path / "sketches")
