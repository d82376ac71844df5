"""A finished folder says in what another request differs from the one that it was made by."""

import json
import os
from pathlib import Path

import pytest

from data_pipeline.corpus.config import CorpusConfig
from data_pipeline.preparation.job import Request, prepare_corpus
from data_pipeline.preparation.made_of import REPORT_NAME
from tests.unit.data_pipeline.preparation.folders import sample_texts, write_corpus


@pytest.fixture
def request_(tokenizer_path: Path, tmp_path: Path) -> Request:
    exam = write_corpus(tmp_path / "exam", sample_texts(2, seed=1), 2)
    tree = {
        "inputs": [{"path": str(write_corpus(tmp_path / "c", sample_texts(12), 4))}],
        "curation": {"decontaminate": {"against": [str(exam)]}},
    }
    request = Request(CorpusConfig.model_validate(tree), str(tokenizer_path), tmp_path / "d")
    prepare_corpus(request, 1)
    return request


@pytest.mark.parametrize("file", ["c/part_002.jsonl", "exam/part_001.jsonl"])
def test_a_file_that_was_touched_is_named(request_: Request, file: str, tmp_path: Path) -> None:
    os.utime(tmp_path / file, ns=(0, 0))
    with pytest.raises(ValueError, match=rf"another state of the input files .*/{file} is new, gone or changed\)"):
        prepare_corpus(request_, 1)


def test_new_and_lost_files_are_named(request_: Request, tmp_path: Path) -> None:
    (tmp_path / "c" / "part_001.jsonl").rename(tmp_path / "c" / "part_009.jsonl")
    with pytest.raises(ValueError, match=r"part_001.jsonl is new, gone or changed, and 1 more\)"):
        prepare_corpus(request_, 1)


def test_other_settings_are_told(request_: Request, tmp_path: Path) -> None:
    plain = request_.corpus.model_copy(update={"curation": CorpusConfig.model_fields["curation"].default})
    with pytest.raises(ValueError, match="is finished, of other inputs or settings"):
        prepare_corpus(Request(plain, request_.tokenizer_path, request_.out), 1)
    with pytest.raises(ValueError, match="is finished, of another size of shards"):
        prepare_corpus(Request(request_.corpus, request_.tokenizer_path, request_.out, shard_bytes=1000), 1)
    with pytest.raises(ValueError, match=r"is finished, of .* another size of units of work"):
        prepare_corpus(Request(request_.corpus, request_.tokenizer_path, request_.out, unit_bytes=1), 1)


@pytest.mark.parametrize("content", ["{", "[]", '{"plan": "0123456789abcdef"}', '{"plan": {}}'])
def test_a_damaged_report_is_told(request_: Request, content: str) -> None:
    (request_.out / REPORT_NAME).write_text(content)
    with pytest.raises(ValueError, match=r"report.json is damaged .*copy it again, or remove .* and prepare it again"):
        prepare_corpus(request_, 1)


def test_hashes_of_other_files_than_there_are_is_damage(request_: Request) -> None:
    path = request_.out / REPORT_NAME
    report = json.loads(path.read_text())
    report["plan"] |= {"fingerprint": "0", "files": report["plan"]["files"][:-8]}
    path.write_text(json.dumps(report))
    with pytest.raises(ValueError, match="report.json is damaged"):
        prepare_corpus(request_, 1)


def test_a_folder_without_a_report_is_another_s(request_: Request) -> None:
    (request_.out / REPORT_NAME).unlink()
    with pytest.raises(ValueError, match=r"is finished, of other inputs or settings.*has no report.json"):
        prepare_corpus(request_, 1)
