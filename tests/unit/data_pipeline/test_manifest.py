import json
from pathlib import Path

import pytest

from data_pipeline.manifest import Manifest
from tests.unit.data_pipeline.conftest import WriteFolder

DOCUMENTS = [[1, 5, 6, 2], [1, 7, 2]]


def test_what_is_saved_is_loaded(write_folder: WriteFolder) -> None:
    folder = write_folder("a", DOCUMENTS)
    manifest = Manifest.load(folder)
    assert (manifest.documents, manifest.tokens, manifest.dtype) == (2, 7, "uint16")
    assert manifest.shards[0].tokens == 7
    manifest.save(folder)
    assert Manifest.load(folder) == manifest


def test_the_fingerprint_knows_the_content(write_folder: WriteFolder) -> None:
    same, again, other = (
        Manifest.load(write_folder(name, documents))
        for name, documents in [("a", DOCUMENTS), ("b", DOCUMENTS), ("c", [[1, 5, 6, 2], [1, 8, 2]])]
    )
    assert same.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize("suffix", ["bin", "idx", "xxh3"])
def test_missing_and_truncated_files(write_folder: WriteFolder, suffix: str) -> None:
    folder = write_folder("a", DOCUMENTS)
    path = folder / f"shard_00000.{suffix}"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{path} has {size - 1} bytes, but the manifest says {size} bytes: copy"):
        Manifest.load(folder)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path} is missing, but the manifest says {size} bytes: copy"):
        Manifest.load(folder)


def test_no_data_folder(write_folder: WriteFolder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist: make it with"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is unfinished or no data folder"):
        Manifest.load(tmp_path)
    folder = write_folder("a", DOCUMENTS)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.model is missing"):
        Manifest.load(folder)


def test_a_damaged_or_foreign_manifest(write_folder: WriteFolder) -> None:
    path = write_folder("a", DOCUMENTS) / "manifest.json"
    fields = json.loads(path.read_text())
    for damaged in ("{", "[]", json.dumps(fields | {"new": 1}), json.dumps(fields | {"shards": [{}]})):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            Manifest.load(path.parent)
    path.write_text(json.dumps(fields | {"format_version": 99}))
    with pytest.raises(ValueError, match="format version 99, but this Steppe reads 1"):
        Manifest.load(path.parent)
