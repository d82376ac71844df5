import json
import shutil
from pathlib import Path

import pytest

from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_files import TokenizerFiles, fingerprint_of, tokenizer_in
from tests.json_tokenizers import BOS, EOS, SPLITS, trained, write
from tests.unit.data_pipeline.servers import file_server


@pytest.fixture
def json_path(texts: list[str], tmp_path: Path) -> Path:
    return write(tmp_path / "published", trained(texts[:3], SPLITS["gpt-2"]), chat_template="{{ x }}")


@pytest.mark.parametrize("kind", ["sentencepiece", "json"])
def test_a_copy_is_the_same_tokenizer(kind: str, json_path: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    path = json_path if kind == "json" else tokenizer_path
    original = Tokenizer(path)
    (tmp_path / "folder").mkdir()
    copy = Tokenizer(original.files.write(tmp_path / "folder"))
    assert copy.path == tokenizer_in(tmp_path / "folder")
    assert copy.fingerprint == original.fingerprint == fingerprint_of(copy.path)
    assert (copy.bos_id, copy.eos_id, copy.vocab_size) == (original.bos_id, original.eos_id, original.vocab_size)
    assert copy.encode("some text") == original.encode("some text")
    names = {"tokenizer.json", "tokenizer_config.json"} if kind == "json" else {"tokenizer.model"}
    assert {file.name for file in (tmp_path / "folder").iterdir()} == names


def test_one_kind_replaces_the_other(json_path: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert tokenizer_in(folder) == folder / "tokenizer.model"
    for path in (tokenizer_path, json_path, tokenizer_path):
        files = TokenizerFiles.read(path)
        files.write(folder)
        assert tokenizer_in(folder).name == files.name
        assert fingerprint_of(tokenizer_in(folder)) == files.fingerprint
        assert len(list(folder.iterdir())) == 1 + (path == json_path)


def test_the_fingerprint_covers_bos_and_eos_and_nothing_that_is_not_used(json_path: Path) -> None:
    config = json_path.with_name("tokenizer_config.json")
    before = fingerprint_of(json_path)
    for said, same in (
        ({"bos_token": {"content": BOS, "lstrip": False}, "eos_token": EOS}, True),
        ({"bos_token": BOS, "eos_token": EOS, "model_max_length": 7}, True),
        ({"bos_token": BOS, "eos_token": BOS}, False),
        ({"bos_token": None, "eos_token": EOS}, False),
    ):
        config.write_text(json.dumps(said))
        assert (fingerprint_of(json_path) == before) is same


def test_who_names_bos_and_eos(json_path: Path) -> None:
    """tokenizer_config.json counts; special_tokens_map.json, where it does not say; nobody, so there is none."""
    config, special = (json_path.with_name(name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    special.write_text(json.dumps({"bos_token": {"content": EOS}, "eos_token": EOS}))
    config.write_text(json.dumps({"bos_token": None}))
    assert (Tokenizer(json_path).bos_id, Tokenizer(json_path).eos_id) == (None, 1)
    config.unlink()
    assert (Tokenizer(json_path).bos_id, Tokenizer(json_path).eos_id) == (1, 1)
    special.unlink()
    assert (Tokenizer(json_path).bos_id, Tokenizer(json_path).eos_id) == (None, None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is damaged .Expecting"),
        (b"[]", "holds no JSON object"),
        (b"\xff", "is damaged"),
        (b'{"eos_token": 7}', "no text but 7"),
    ],
)
def test_a_damaged_config(content: bytes, reason: str, json_path: Path) -> None:
    json_path.with_name("tokenizer_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"tokenizer_config.json.*{reason}"):
        Tokenizer(json_path)
    assert fingerprint_of(json_path) is None


def test_one_behind_a_server(json_path: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    for path in (json_path, json_path.with_name("tokenizer_config.json"), tokenizer_path):
        shutil.copyfile(path, tmp_path / path.name)
    with file_server(tmp_path) as server:
        for path in (json_path, tokenizer_path):
            there = Tokenizer(f"{server.url}/{path.name}")
            assert there.fingerprint == fingerprint_of(path)
            assert there.encode("some text") == Tokenizer(path).encode("some text")
        assert fingerprint_of(f"{server.url}/none.model") is None
