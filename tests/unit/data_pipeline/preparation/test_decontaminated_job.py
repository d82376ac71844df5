"""A preparation that is held against evaluation sets: what of them is read, counted and refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.corpus.config import CorpusConfig
from data_pipeline.preparation.curation_phases import ContaminationPhase
from data_pipeline.preparation.job import Request, prepare_corpus
from data_pipeline.preparation.phase import Job
from data_pipeline.preparation.plan import make_plan
from data_pipeline.tokenizer import Tokenizer
from tests.unit.data_pipeline.preparation.folders import documents_of, sample_texts, write_rows

QUESTIONS = [" ".join(f"question{number}word{i}" for i in range(20)) for number in range(3)]
TEXTS = [*sample_texts(5), *(f"before {question} after" for question in QUESTIONS)]


def corpus_against(tmp_path: Path, *against: Any) -> CorpusConfig:
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in TEXTS])
    tree = {"inputs": [{"path": str(corpus)}], "curation": {"decontaminate": {"against": list(against)}}}
    return CorpusConfig.model_validate(tree)


def test_each_set_has_its_field_and_is_counted(tokenizer: Tokenizer, tokenizer_path: Path, tmp_path: Path) -> None:
    exam = write_rows(tmp_path / "exam.jsonl", [{"text": QUESTIONS[0]}, {"text": "too short"}])
    rows = [{"q": {"body": QUESTIONS[1]}, "split": "test"}, {"q": {"body": QUESTIONS[2]}, "split": "train"}]
    quiz = write_rows(tmp_path / "quiz.jsonl", rows)
    corpus = corpus_against(
        tmp_path, str(exam), {"path": str(quiz), "name": "riddles", "text_field": "q.body", "where": {"split": "test"}}
    )
    out = tmp_path / "d"
    assert prepare_corpus(Request(corpus, str(tokenizer_path), out), 1).documents == 6
    assert [tokenizer.decode(document) for document in documents_of(out)] == [*TEXTS[:5], TEXTS[7]]
    report = json.loads((out / "report.json").read_text())
    assert report["evaluation_sets"] == {"exam": {"texts": 2, "too_short": 1}, "riddles": {"texts": 1, "too_short": 0}}
    removed = report["inputs"]["corpus"]["removed"]
    assert {rule: tally["documents"] for rule, tally in removed.items()} == {
        "decontaminate.exam": 1,
        "decontaminate.riddles": 1,
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("exam.jsonl", b'{"text": "%s"}\n{"question": "?"}\n', "record 2 of .*exam.jsonl is no text .no field 'text'"),
        ("exam.jsonl", b'{"text": "%s"}\n{"text": \n', "record 2 of .*exam.jsonl is no text .invalid JSON"),
        ("exam.jsonl", b'{"text": 3}\n{"text": "%s"}\n', "record 1 of .*field 'text' is no text but int"),
        ("exam.txt", b"%s\0", "exam.txt is no text .binary file"),
        ("exam.jsonl", b'{"text": "two words"}\n', "has no text of 13 words or more"),
    ],
)
def test_what_would_not_be_found_is_refused(
    tokenizer_path: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content.replace(b"%s", QUESTIONS[0].encode()))
    request = Request(corpus_against(tmp_path, str(tmp_path / name)), str(tokenizer_path), tmp_path / "d")
    with pytest.raises(ValueError, match=f"evaluation set exam.*{message}") as error:
        prepare_corpus(request, 1)
    assert "question0" not in str(error.value)


def test_what_was_planned_is_read_and_nothing_else(tokenizer_path: Path, tmp_path: Path) -> None:
    first = write_rows(tmp_path / "sets" / "a.jsonl", [{"text": QUESTIONS[0]}])
    corpus = corpus_against(tmp_path, str(tmp_path / "sets"))
    (tmp_path / "d").mkdir()
    job = Job(tmp_path / "d", make_plan(corpus, "abc", 1000), str(tokenizer_path))
    job.work.make()
    phase = ContaminationPhase(job)
    write_rows(tmp_path / "sets" / "b.jsonl", [{"text": QUESTIONS[1]}])
    read: list[int] = []
    assert phase.do(0, 1, read.append) == {"sets": {"texts": 1, "too_short": 0}}
    assert [sum(read)] == phase.sizes()
    os.utime(first, ns=(0, 0))
    with pytest.raises(ValueError, match="a.jsonl"):
        phase.do(0, 1, read.append)
