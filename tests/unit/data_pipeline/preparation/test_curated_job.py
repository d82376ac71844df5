"""A preparation that removes documents: which, why, and that the report accounts for each."""

import json
from pathlib import Path

from data_pipeline.corpus.config import CorpusConfig
from data_pipeline.preparation.job import Request, prepare_corpus
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.verify import verify
from tests.unit.data_pipeline.preparation.folders import documents_of, sample_texts, write_rows


def test_each_rule_removes_what_it_should_and_is_counted(
    tokenizer: Tokenizer, tokenizer_path: Path, tmp_path: Path
) -> None:
    texts = sample_texts(40)
    question = " ".join(f"question{i}" for i in range(20))
    rows = [{"text": text, "language": "en"} for text in texts]
    rows[3]["language"] = "de"
    rows[5]["text"] = "too short"
    rows[8]["text"] += f" {question}"
    rows[20]["text"] = rows[2]["text"]  # in another unit than its original
    rows[30]["text"] = rows[4]["text"] + " and"
    rows[31]["text"] = rows[4]["text"] + " so"
    gone = {3, 5, 8, 20, 30, 31}
    write_rows(tmp_path / "one.jsonl", rows[:15])
    write_rows(tmp_path / "two.jsonl", rows[15:])
    write_rows(tmp_path / "exam.jsonl", [{"text": question}])
    tree = {
        "inputs": [
            {"path": str(tmp_path / "one.jsonl"), "where": {"language": "en"}},
            {"path": str(tmp_path / "two.jsonl")},
        ],
        "curation": {
            "length": {"min_characters": 20},
            "decontaminate": {"against": [str(tmp_path / "exam.jsonl")]},
            "exact_duplicates": True,
            "near_duplicates": {"threshold": 0.7},
        },
    }
    corpus, out = CorpusConfig.model_validate(tree), tmp_path / "d"
    manifest = prepare_corpus(Request(corpus, str(tokenizer_path), out, 10_000, 1), 1)
    kept = [row["text"] for number, row in enumerate(rows) if number not in gone]
    assert [tokenizer.decode(document) for document in documents_of(out)] == kept
    assert manifest.text_bytes == sum(len(text.encode()) for text in kept)
    assert len(manifest.shards) > 2
    verify(out)

    inputs = json.loads((out / "report.json").read_text())["inputs"]
    removed = {name: {rule: t["documents"] for rule, t in part["removed"].items()} for name, part in inputs.items()}
    assert removed == {
        "one": {"where": 1, "length.min_characters": 1, "decontaminate.exam": 1},
        "two": {"exact_duplicates": 1, "near_duplicates": 2},
    }
    assert inputs["two"]["removed"]["exact_duplicates"]["text_bytes"] == len(rows[2]["text"])
    assert [part["kept"]["documents"] for part in inputs.values()] == [12, 22]
    assert sum(part["tokens"] for part in inputs.values()) == manifest.tokens


def test_lines_that_c4_takes_out_are_accounted_for(tokenizer: Tokenizer, tokenizer_path: Path, tmp_path: Path) -> None:
    sentence = "This is a line of some words that ends as it should. "
    page = f"{sentence * 4}\nClick here\n{sentence}"
    write_rows(tmp_path / "page.jsonl", [{"text": page}])
    tree = {"inputs": [{"path": str(tmp_path / "page.jsonl")}], "curation": {"c4": True}}
    prepare_corpus(Request(CorpusConfig.model_validate(tree), str(tokenizer_path), tmp_path / "d"), 1)
    (document,) = documents_of(tmp_path / "d")
    stored = tokenizer.decode(document)
    assert "Click here" not in stored
    counts = json.loads((tmp_path / "d" / "report.json").read_text())["inputs"]["page"]
    assert counts["read"]["text_bytes"] == len(page)
    assert counts["kept"]["text_bytes"] == len(stored)
    assert counts["trimmed_bytes"] == len(page) - len(stored) > 0


def test_units_of_which_nothing_is_left_are_no_trouble(tokenizer_path: Path, tmp_path: Path) -> None:
    texts = sample_texts(6)
    write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    write_rows(tmp_path / "b.jsonl", [{"text": text} for text in texts])
    (tmp_path / "c.jsonl").touch()
    tree = {
        "inputs": [{"path": str(tmp_path / "*.jsonl"), "name": "twice"}],
        "curation": {"exact_duplicates": True, "near_duplicates": True},
    }
    request = Request(CorpusConfig.model_validate(tree), str(tokenizer_path), tmp_path / "d", unit_bytes=1)
    assert prepare_corpus(request, 1).documents == 6
