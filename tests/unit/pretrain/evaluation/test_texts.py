"""Texts of every kind with their domains, and what is said of them before a model runs."""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import retries
from pretrain.evaluation import texts
from pretrain.evaluation.texts import (
    TextsConfig,
    count_words,
    identities,
    read_texts,
    survey,
    survey_bytes,
    texts_config,
)
from tests.unit.data_pipeline.corpus.hub_server import COMMIT, DATASET, hub_server
from tests.unit.data_pipeline.servers import file_server, point_at_s3, s3_server

ROWS: list[dict[str, Any]] = [
    {"text": "one two\n", "meta": {"lang": "en"}, "year": 1999, "fresh": True},
    {"text": "  zwei  ", "meta": {"lang": "de"}, "year": 2001, "fresh": False},
    {"text": "三 🎈", "meta": {"lang": "zh"}, "year": 1999, "fresh": True},
    {"text": "four\r\n\tfive", "meta": {"lang": "en"}, "year": 0.5, "fresh": True},
]
TEXTS = [str(row["text"]) for row in ROWS]
TEXT_BYTES = sum(len(text.encode()) for text in TEXTS)


def write_rows(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(*data: Path | str, **words: Any) -> list[tuple[str, str]]:
    """(domain, text) of each document; their places are counted through."""
    documents = list(read_texts(texts_config([str(path) for path in data], **words)))
    assert [document.index for document in documents] == list(range(len(documents)))
    assert all(document.ids is None for document in documents)
    return [(document.domain, document.text) for document in documents]


def domains(*data: Path | str, **words: Any) -> list[str]:
    return [domain for domain, _ in read(*data, **words)]


def test_domains_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    config = texts_config(["web=x/news.txt", "news.txt", "a=b.txt", "folder/", "https://host/z.txt?a=b", "owner/name"])
    assert [(input_.name, input_.path) for input_ in config.inputs] == [
        ("web", "x/news.txt"),
        ("news", "news.txt"),
        ("a=b", "a=b.txt"),
        ("folder", "folder/"),
        ("z", "https://host/z.txt?a=b"),
        ("name", "owner/name"),
    ]
    (pattern,) = texts_config(["corpus/lang=en/*.txt"]).inputs
    assert (pattern.name, pattern.path) == ("lang=en", "corpus/lang=en/*.txt")
    monkeypatch.chdir(tmp_path / "folder")
    assert [(input_.name, input_.path) for input_ in texts_config(["."]).inputs] == [("folder", ".")]


@pytest.mark.parametrize(
    ("data", "words", "message"),
    [
        (["a/news.txt", "b/news.jsonl"], {}, r"--data b/news.jsonl: the domain news is a/news.txt already.*NAME=PATH"),
        (["x=a", "x=b"], {}, "the domain x is a already"),
        (["=a"], {}, "expected PATH or NAME=PATH"),
        (["x="], {}, "expected PATH or NAME=PATH"),
        ([], {}, "name texts with --data PATH or --corpus YAML"),
        (["a"], {"by_folder": True, "by_field": "lang"}, "--by-folder and --by-field lang exclude each other"),
        (["a"], {"corpus": Path("c.yaml")}, "--data a and --corpus c.yaml exclude each other"),
        ([], {"corpus": Path("c.yaml"), "text_field": "body"}, "--text-field body is for --data: set text_field"),
        ([], {"corpus": Path("c.yaml")}, "c.yaml: no such corpus file"),
    ],
)
def test_what_cannot_be_asked(data: list[str], words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        texts_config(data, **words)


def test_a_corpus_in_yaml_names_the_inputs(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"body": row["text"], "year": row["year"]} for row in ROWS])
    (tmp_path / "more.txt").write_text("more")
    yaml = tmp_path / "corpus.yaml"
    yaml.write_text(
        f"inputs:\n- {{path: {rows}, name: old, text_field: body, where: {{year: {{max: 2000}}}}}}\n"
        f"- {{path: {tmp_path}/*.txt, name: new}}\n"
    )
    config = texts_config(corpus=yaml)
    expected = [("old", TEXTS[0]), ("old", TEXTS[2]), ("old", TEXTS[3]), ("new", "more")]
    assert [(document.domain, document.text) for document in read_texts(config)] == expected
    assert TextsConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config

    yaml.write_text(f"inputs: [{{path: {rows}}}]\ncuration: {{exact_duplicates: true}}\n")
    with pytest.raises(ValueError, match="corpus.yaml curates, but a measurement leaves nothing out: take"):
        texts_config(corpus=yaml)


def test_files_of_every_kind_give_the_same_documents(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows))
    (tmp_path / "c.jsonl.zst").write_bytes(pyarrow.compress(rows, "zstd", asbytes=True))
    table = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pyarrow.OSFile(str(tmp_path / "e.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for number, text in enumerate(TEXTS):
        (tmp_path / f"f{number}.txt").write_bytes(text.encode())
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.arrow", "f*.txt")]
    got = read(*[f"{at}={path}" for at, path in enumerate(paths)])
    assert got == [(str(at), text) for at in range(len(paths)) for text in TEXTS]
    assert [text for _, text in read(tmp_path)] == TEXTS * len(paths)


def test_the_text_may_stand_in_another_field(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", [{"doc": {"body": text}} for text in TEXTS])
    assert [text for _, text in read(rows, text_field="doc.body")] == TEXTS


def test_what_a_document_counts() -> None:
    document = texts.EvaluationDocument(0, "x", "三 🎈\tnaïve\n\n")
    assert (document.text_bytes, document.words) == (3 + 1 + 4 + 1 + 6 + 2, 3)


@settings(max_examples=200)
@given(text=st.text(alphabet="ab \n\t\xa0\u2003\x1c三🎈", max_size=40), piece=st.integers(1, 7))
def test_words_are_counted_in_pieces(text: str, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "WORD_CHARACTERS", piece)
        assert count_words(text) == len(text.split())


def test_domains_by_folder(tmp_path: Path) -> None:
    for name in ("en/a.txt", "en/deep/b.txt", "zh/c.txt", "top.txt"):
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_text(name)
    (tmp_path / "alone.txt").write_text("alone")
    expected = [("en", "en/a.txt"), ("en", "en/deep/b.txt"), (".", "top.txt"), ("zh", "zh/c.txt")]
    assert read(tmp_path / "corpus", by_folder=True) == expected
    assert read(f"{tmp_path}/corpus/*/*.txt", by_folder=True) == [expected[0], expected[3]]
    several = read(f"web={tmp_path}/corpus", tmp_path / "alone.txt", by_folder=True)
    assert [domain for domain, _ in several] == ["web/en", "web/en", "web", "web/zh", "alone"]


def test_domains_by_field(tmp_path: Path) -> None:
    lines = write_rows(tmp_path / "a.jsonl")
    table = tmp_path / "b.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row, year=str(row["year"])) for row in ROWS]), table)
    assert domains(lines, by_field="meta.lang") == domains(table, by_field="meta.lang") == ["en", "de", "zh", "en"]
    assert domains(lines, by_field="year") == domains(table, by_field="year") == ["1999", "2001", "1999", "0.5"]
    assert domains(lines, by_field="fresh") == ["true", "false", "true", "true"]
    assert domains(lines, table, by_field="meta.lang")[3:6] == ["a/en", "b/en", "b/de"]


def test_what_cannot_be_grouped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "a", "lang": "en"}, {"text": "b"}]
    table = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    (tmp_path / "plain.txt").write_text("text")
    cases = [
        (
            write_rows(tmp_path / "none.jsonl", rows),
            r"none.jsonl:2: no field 'lang' to group by; repair or remove it, or name another field",
        ),
        (table, r"t.parquet:2: no field 'lang' to group by"),
        (
            write_rows(tmp_path / "list.jsonl", [{"text": "a", "lang": ["en"]}]),
            "list.jsonl:1: .*no text or number but",
        ),
        (write_rows(tmp_path / "empty.jsonl", [{"text": "a", "lang": ""}]), "empty.jsonl:1: field 'lang'.* is empty"),
        (tmp_path / "plain.txt", "plain.txt is plain text, which has no field 'lang' to group by: group by folder"),
    ]
    for path, message in cases:
        for ask in (read, lambda data, **words: survey(texts_config([str(data)], **words))):
            with pytest.raises(ValueError, match=message):
                ask(path, by_field="lang")
    with pytest.raises(ValueError, match=r"t.parquet has no column 'tongue': name one of text, lang with .*--by-field"):
        read(table, by_field="tongue")
    monkeypatch.setattr(texts, "MOST_DOMAINS", 2)
    many = write_rows(tmp_path / "many.jsonl")
    with pytest.raises(ValueError, match="--by-field meta.lang gives more than 2 domains: group by something of fewer"):
        read(many, by_field="meta.lang")
    with pytest.raises(ValueError, match="gives more than 2 domains"):
        survey(texts_config([str(many)], by_field="meta.lang"))


def test_a_survey_counts_the_text(tmp_path: Path) -> None:
    lines = write_rows(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    config = texts_config([f"plain={lines}", f"packed={tmp_path}/b.jsonl.gz"])
    told: list[int] = []
    found = survey(config, told.append)
    assert found == texts.Survey(2 * TEXT_BYTES, 2 * len(TEXTS), {"plain": TEXT_BYTES, "packed": TEXT_BYTES})
    stored = sum(path.stat().st_size for path in (lines, tmp_path / "b.jsonl.gz"))
    assert sum(told) == survey_bytes(config) == stored
    grouped = survey(texts_config([str(lines)], by_field="meta.lang"))
    assert grouped is not None
    assert list(grouped.domains) == ["en", "de", "zh"]
    assert sum(grouped.domains.values()) == grouped.bytes == TEXT_BYTES


def test_a_survey_refuses_what_cannot_be_measured(tmp_path: Path) -> None:
    cases = {
        "no document in .*none.jsonl": write_rows(tmp_path / "none.jsonl", []),
        "the documents of empty hold no text": write_rows(tmp_path / "empty.jsonl", [{"text": ""}, {"text": ""}]),
        "no field 'text'": write_rows(tmp_path / "other.jsonl", [{"content": "a"}]),
        "does not exist": tmp_path / "missing.jsonl",
    }
    (tmp_path / "bad.txt").write_bytes(b"good\n\xff\n")
    cases["bad.txt:2: invalid UTF-8 .* leaves nothing out"] = tmp_path / "bad.txt"
    full = write_rows(tmp_path / "full.jsonl")
    for message, path in cases.items():
        with pytest.raises(ValueError, match=message):
            survey(texts_config([str(full), str(path)]))


def test_files_passed_over_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\0\0")
    found = survey(texts_config([str(tmp_path)]))
    assert found is not None
    assert (found.bytes, found.documents) == (4, 1)


def test_identities_tell_when_a_file_has_changed(tmp_path: Path) -> None:
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl")
    config = texts_config([f"x={tmp_path}/a.jsonl", f"y={tmp_path}"])
    before = identities(config)
    assert [(row["input"], Path(row["path"]).name) for row in before] == [
        ("x", "a.jsonl"),
        ("y", "a.jsonl"),
        ("y", "b.jsonl"),
    ]
    assert json.loads(json.dumps(before)) == before == identities(config)
    write_rows(tmp_path / "b.jsonl", ROWS[::-1])  # of the same size
    after = identities(config)
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, False]
    assert after[2]["size"] == before[2]["size"]


def test_texts_on_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 0.001)
    rows = write_rows(tmp_path / "served" / "en" / "a.jsonl")
    expected = [("web", text) for text in TEXTS]
    with file_server(tmp_path / "served") as server:
        server.faults.extend(["503", "truncated"])
        config = texts_config([f"web={server.url}/en/a.jsonl?signature=secret"])
        assert [(document.domain, document.text) for document in read_texts(config)] == expected
        assert survey(config) is None
        assert survey_bytes(config) == rows.stat().st_size
        (row,) = identities(config)
        assert row["path"] == f"{server.url}/en/a.jsonl"
        assert read(f"web={server.url}/en/a.jsonl") == expected
        assert not [request for request in server.requests if "manifest" in request.path]
    import s3fs

    with s3_server() as endpoint:
        point_at_s3(monkeypatch, endpoint)
        s3fs.S3FileSystem().mkdir("texts")
        s3fs.S3FileSystem().put(str(tmp_path / "served"), "texts/served", recursive=True)
        assert read("web=s3://texts/served") == expected
        assert domains("s3://texts/served", by_folder=True) == ["en"] * len(TEXTS)


@pytest.mark.slow
def test_a_dataset_of_the_hub(tmp_path: Path) -> None:
    """In a process of its own, since its libraries read where the hub is when they are imported."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row, lang=row["meta"]["lang"]) for row in ROWS]), sink)
    reader = (
        "import json\nfrom pretrain.evaluation.texts import *\n"
        f"config = texts_config(['science={DATASET}'], by_field='lang')\n"
        "print(json.dumps([survey(config), identities(config), [[d.domain, d.text] for d in read_texts(config)]]))"
    )
    with hub_server({"data/train-00000-of-00001.parquet": bytes(sink.getvalue())}) as server:
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-P", "-c", reader]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    known, files, documents = json.loads(done.stdout)
    assert known is None
    assert files == [{"input": "science", "path": f"{DATASET} (shard 1 of 1)", "size": None, "tag": COMMIT}]
    assert documents == [[row["meta"]["lang"], row["text"]] for row in ROWS]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A file is read, surveyed and grouped through a few hundred kB, whether it is of 3 MB or 24 MB."""
    row = json.dumps({"text": "steppe " * 500, "lang": "en"}) + "\n"
    peaks = []
    for megabytes in (3, 24):
        path = tmp_path / f"{megabytes}.jsonl"
        path.write_text(row * (megabytes * 1_000_000 // len(row)))
        config = texts_config([str(path)], by_field="lang")
        next(read_texts(config))  # what is imported late
        tracemalloc.start()
        read_bytes = sum(document.text_bytes for document in read_texts(config))
        found = survey(config)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found is not None
        assert found.bytes == read_bytes == found.documents * 3500
    assert max(peaks) < 1_000_000
    assert peaks[1] < peaks[0] + 100_000, peaks
