"""Corpora on servers, and tokenizers of others."""

import gzip
import json
from pathlib import Path

import pytest

from data_pipeline import retries
from data_pipeline.preparation.job import prepare
from data_pipeline.preparation.work_folder import WorkFolder
from data_pipeline.tokenizer import Tokenizer
from tests.json_tokenizers import SPLITS, trained, write
from tests.unit.data_pipeline.preparation.folders import documents_of, files_of, sample_texts
from tests.unit.data_pipeline.servers import file_server


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be served, with an archive in it; and no long waits between attempts."""
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 0.01)
    folder = tmp_path / "served"
    folder.mkdir()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in sample_texts(40))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode(), mtime=0))
    return folder


def test_a_server_with_faults_gives_the_same_folder_as_a_disk(
    served: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    prepare([served / "a.jsonl.gz"], tokenizer_path, tmp_path / "local")
    with file_server(served) as server:
        server.faults.extend(["503", "reset", "truncated"])
        prepare([f"{server.url}/a.jsonl.gz"], tokenizer_path, tmp_path / "remote")
        assert not server.faults
    local, far = files_of(tmp_path / "local"), files_of(tmp_path / "remote")
    differing = {name for name in local.keys() | far.keys() if local.get(name) != far.get(name)}
    assert differing == {"origins.json", "manifest.json", "report.json"}  # which hold or cover the file's name


def test_a_server_that_stays_away_can_be_waited_for(served: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    with file_server(served) as server:
        url = f"{server.url}/a.jsonl.gz"

        def go_away(progress: object) -> None:
            server.always = "503"

        with pytest.raises(OSError, match="a.jsonl.gz failed 8 times"):
            prepare([url], tokenizer_path, out, progress=go_away)
        assert WorkFolder(out).path.exists()
        server.always = "none"
        assert prepare([url], tokenizer_path, out).documents == 40


def test_a_file_that_changes_after_it_was_listed_is_refused(served: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    (served / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "b"}\n', mtime=0))

    with file_server(served) as server:

        def change(progress: object) -> None:
            server.etags["/b.jsonl.gz"] = '"another"'

        urls = [f"{server.url}/a.jsonl.gz", f"{server.url}/b.jsonl.gz"]
        with pytest.raises(ValueError, match=r"b.jsonl.gz.*changed"):
            prepare(urls, tokenizer_path, tmp_path / "d", progress=change)


def test_a_tokenizer_json_travels_with_the_folder(served: Path, texts: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "published", trained(texts[:3], SPLITS["gpt-2"]))
    manifest = prepare([served / "a.jsonl.gz"], path, tmp_path / "d")
    assert manifest.tokenizer_file == "tokenizer.json"
    tokenizer = Tokenizer(tmp_path / "d" / "tokenizer.json")
    assert tokenizer.fingerprint == manifest.tokenizer_fingerprint == Tokenizer(path).fingerprint
    stored = documents_of(tmp_path / "d")
    assert [tokenizer.decode(document[1:-1]) for document in stored] == sample_texts(40)
    assert {document[0] for document in stored} == {tokenizer.bos_id}
    assert {document[-1] for document in stored} == {tokenizer.eos_id}
