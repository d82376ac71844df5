"""Texts out of token shards: the ids that were stored, and what they decode to."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import retries
from data_pipeline.manifest import Manifest
from data_pipeline.preparation.job import prepare
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_training import train_tokenizer
from pretrain.evaluation.texts import identities, read_texts, survey, survey_bytes, texts_config
from tests.json_tokenizers import SPLITS, trained, write
from tests.tiny_hf import TEXTS, VOCAB_SIZE, tokenizer_without
from tests.unit.data_pipeline.servers import file_server, point_at_s3, s3_server
from tests.unit.data_pipeline.test_verify import flip

STORED = [*TEXTS, "one <s> more </s>", "\n", *TEXTS[::-1]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORED))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS, VOCAB_SIZE, path)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def folder(rows: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of several shards."""
    path = tmp_path_factory.mktemp("data") / "held_out"
    assert len(prepare([rows], tokenizer.path, path, workers=1, shard_bytes=1000).shards) > 2
    return path


def check(path: Path | str, tokenizer: Tokenizer, given: bool = True, **words: Any) -> None:
    """What is read of a folder is what it was made of."""
    documents = list(read_texts(texts_config([f"web={path}"], **words), tokenizer if given else None))
    assert [document.text for document in documents] == STORED
    assert [document.index for document in documents] == list(range(len(STORED)))
    for document in documents:
        assert document.domain == ("." if words else "web")
        assert document.ids is not None
        assert document.ids.tolist() == tokenizer.encode(document.text)


def test_documents_of_a_folder(folder: Path, tokenizer: Tokenizer) -> None:
    check(folder, tokenizer)
    check(f"file://{folder}", tokenizer, given=False)
    check(folder, tokenizer, by_folder=True)


def test_a_tokenizer_without_bos(rows: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_without(tmp_path / "tokenizer.model", bos_id=-1)
    prepare([rows], tokenizer.path, tmp_path / "data", workers=1)
    check(tmp_path / "data", tokenizer)


def test_a_tokenizer_in_json(rows: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(write(tmp_path, trained(STORED, SPLITS["gpt-2"])))
    prepare([rows], tokenizer.path, tmp_path / "data", workers=1)
    check(tmp_path / "data", tokenizer)


def test_texts_and_shards_side_by_side(folder: Path, rows: Path, tokenizer: Tokenizer) -> None:
    documents = list(read_texts(texts_config([str(rows), str(folder)]), tokenizer))
    halves = documents[: len(STORED)], documents[len(STORED) :]
    assert [[document.text for document in half] for half in halves] == [STORED, STORED]
    assert [{document.domain for document in half} for half in halves] == [{"rows"}, {"held_out"}]
    assert {document.ids is None for document in halves[0]} == {True}
    assert [document.index for document in documents] == list(range(2 * len(STORED)))


def test_the_tokenizer_must_be_the_models(folder: Path, tokenizer: Tokenizer, rows: Path, tmp_path: Path) -> None:
    other = tokenizer_without(tmp_path / "other.model", bos_id=-1)
    config = texts_config([str(rows), str(folder)])
    message = (
        rf"the tokens of {folder} are of another tokenizer \(fingerprint {tokenizer.fingerprint}\) than the model's, "
        rf"{other.path} \({other.fingerprint}\): name the text that it was made from"
    )
    with pytest.raises(ValueError, match=message):
        read_texts(config, other)  # before anything is read


def test_shards_have_no_fields(folder: Path) -> None:
    config = texts_config([str(folder)], by_field="lang")
    for ask in (read_texts, survey, identities):
        with pytest.raises(ValueError, match="holds token shards, which have no field 'lang' to group by"):
            ask(config)


def test_shards_are_no_text(folder: Path) -> None:
    """Manifests and indices in a folder's folder are not taken for documents."""
    above = texts_config([str(folder.parent)])
    for ask in (lambda config: list(read_texts(config)), survey, identities):
        with pytest.raises(ValueError, match=rf"holds token shards, .*or for an evaluation {folder} itself"):
            ask(above)
    with pytest.raises(ValueError, match="holds token shards, which are no text"):
        prepare([folder], folder / "tokenizer.model", folder.parent / "again", workers=1)


def test_what_is_known_before_shards_are_read(folder: Path, rows: Path) -> None:
    manifest = Manifest.load(folder)
    text_bytes = sum(len(text.encode()) for text in STORED)
    config = texts_config([str(rows), str(folder)])
    found = survey(config)
    assert found is not None
    assert (found.bytes, found.documents) == (2 * text_bytes, 2 * len(STORED))
    assert found.domains == {"rows": text_bytes, "held_out": text_bytes}
    assert survey_bytes(config) == rows.stat().st_size
    expected = {"input": "held_out", "path": str(folder), "size": 2 * manifest.tokens, "tag": manifest.fingerprint}
    assert identities(config)[1] == expected


def test_damage_is_found(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    flip(copy / "shard_00001.bin", 10)
    with pytest.raises(ValueError, match="shard_00001.bin is damaged in block 0"):
        list(read_texts(texts_config([str(copy)]), tokenizer))
    (copy / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        survey(texts_config([str(copy)]))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder for temporary files, of which nothing is kept; and no waits between retries."""
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 0.001)
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("scratch")
def test_shards_on_a_web_server(folder: Path, tokenizer: Tokenizer) -> None:
    with file_server(folder.parent) as server:
        url = f"{server.url}/{folder.name}"
        server.faults.extend(["503", "truncated", "reset"])
        check(url, tokenizer)
        assert len(server.gets("shard_00001.bin")) == 1
        check(f"{url}/", tokenizer, given=False)
        config = texts_config([url])
        found = survey(config)  # by the manifest alone
        assert found is not None
        assert found.documents == len(STORED)
        assert identities(config)[0]["tag"] == Manifest.load(folder).fingerprint
        server.always = "403"  # as stores answer that do not want to say what is not there
        with pytest.raises(ValueError, match="looking at .*/nothing failed: access is refused"):
            list(read_texts(texts_config([f"{server.url}/nothing"])))


@pytest.mark.usefixtures("scratch")
def test_shards_in_an_object_store(folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    with s3_server() as endpoint:
        point_at_s3(monkeypatch, endpoint)
        s3fs.S3FileSystem().mkdir("shards")
        s3fs.S3FileSystem().put(str(folder), "shards/held_out", recursive=True)
        check("s3://shards/held_out", tokenizer, given=False)
        with pytest.raises(ValueError, match="evaluation s3://shards/held_out itself"):
            list(read_texts(texts_config(["s3://shards"])))
