import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash

from data_pipeline.manifest import Manifest, PackInfo
from tests.unit.data_pipeline.conftest import WriteFolder
from tests.unit.data_pipeline.servers import file_server

DOCUMENTS = [[1, 5, 6, 2], [1, 7, 2]]
PACK = PackInfo(
    sequence_length=4,
    block_tokens=100,
    samples=2,
    tokens=7,
    padding_tokens=1,
    cut_documents=0,
    blocks_xxh3="1" * 16,
    shard_xxh3=("2" * 16,),
)


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


def test_loading_looks_at_nothing_else(write_folder: WriteFolder) -> None:
    """Files are looked at when they are opened."""
    folder = write_folder("a", DOCUMENTS)
    manifest = Manifest.load(folder)
    for path in folder.iterdir():
        if path.name != "manifest.json":
            path.unlink()
    assert Manifest.load(str(folder)) == manifest


def test_no_data_folder(write_folder: WriteFolder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^data folder .*/nowhere does not exist: make it with"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"^data folder {tmp_path} is unfinished or no data folder"):
        Manifest.load(tmp_path)


def test_from_a_server(write_folder: WriteFolder) -> None:
    folder = write_folder("a", DOCUMENTS)
    with file_server(folder.parent) as server:
        assert Manifest.load(f"{server.url}/a") == Manifest.load(folder)
        assert [(request.method, request.path) for request in server.requests] == [("GET", "/a/manifest.json")]
        url = server.url.replace("//", "//user:secret@")
        with pytest.raises(ValueError, match=rf"^data folder {server.url}/b is unfinished or no data folder"):
            Manifest.load(f"{url}/b?signature=secret")


def test_a_folder_without_news_is_as_it_was(write_folder: WriteFolder) -> None:
    """Its manifest keeps its fingerprint, which runs have recorded, and older readers."""
    folder = write_folder("a", DOCUMENTS)
    fields = json.loads((folder / "manifest.json").read_text())
    assert fields["format_version"] == 1
    assert list(fields) == [
        *("vocab_size", "bos_id", "eos_id", "tokenizer_fingerprint", "dtype", "documents", "tokens", "text_bytes"),
        *("quarantined", "skipped_files", "shards", "format_version"),
    ]
    assert list(fields["shards"][0]) == [
        *("name", "tokens", "documents", "bin_bytes", "idx_bytes", "idx_xxh3", "hashes_xxh3")
    ]
    old = Manifest.load(folder)
    assert old.fingerprint == xxhash.xxh3_64_hexdigest((folder / "manifest.json").read_bytes())


@pytest.mark.parametrize(
    "news",
    [
        {"packs": (PACK, replace(PACK, sequence_length=8))},
        {"tokenizer_file": "tokenizer.json"},
        {"origins_xxh3": "3" * 16},
    ],
)
def test_news_make_it_version_2(write_folder: WriteFolder, news: dict[str, Any]) -> None:
    folder = write_folder("a", DOCUMENTS)
    old = Manifest.load(folder)
    new = replace(old, **news)
    new.save(folder)
    assert json.loads((folder / "manifest.json").read_text())["format_version"] == 2
    assert Manifest.load(folder) == new != old
    assert new.fingerprint != old.fingerprint
    assert new.stream_fingerprint == old.stream_fingerprint, "the tokens are the same"


def test_a_damaged_or_foreign_manifest(write_folder: WriteFolder) -> None:
    path = write_folder("a", DOCUMENTS) / "manifest.json"
    fields = json.loads(path.read_text())
    for damaged in ("{", "[]", json.dumps(fields | {"new": 1}), json.dumps(fields | {"shards": [{}]}), json.dumps({})):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            Manifest.load(path.parent)
    path.write_text(json.dumps(fields | {"format_version": 99}))
    with pytest.raises(ValueError, match="format version 99, but this Steppe reads up to 2: prepare it again"):
        Manifest.load(path.parent)
