import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.corpus.config import CorpusConfig, InputConfig, corpus_of
from data_pipeline.corpus.document import Document, Grouping, Rejected
from data_pipeline.corpus.listing import corpus_bytes
from data_pipeline.corpus.reading import read_documents, read_file
from tests.unit.data_pipeline.corpus.reading_helpers import TEXTS, as_lines, only_file, read, texts_of


def compress_zst(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", compress_zst)],
)
def test_json_lines(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"c.jsonl{suffix}"
    path.write_bytes(compress(as_lines(TEXTS)))
    documents, rejected = read(path)
    assert documents == [Document(text, str(path), i) for i, text in enumerate(TEXTS)]
    assert not rejected


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".zst", compress_zst), (".xz", lzma.compress)]
)
def test_a_truncated_archive_is_no_short_corpus(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"c.jsonl{suffix}"
    content = compress(as_lines([json.dumps(list(range(i, i + 99))) for i in range(2000)]))
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ValueError, match=r"c\.jsonl.* is truncated or damaged"):
        read(path)


def test_a_damaged_archive(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    content = bytearray(gzip.compress(as_lines([str(i) for i in range(20_000)])))
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="truncated or damaged"):
        read(path)


def test_broken_lines_are_reported_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut of',
        b'{"text": "bad \xff\xfe"}',
        b'{"other": "field"}',
        b'["no object"]',
        b"",
        b'{"text": 5}',
        b'{"text": "half \\ud83d"}',
        b'{"text": "whole \\ud83d\\ude00"}',
        b"[" * 100_000,
        b'{"text": ""}',
        b'{"text": "last"}',
    ]
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    documents, rejected = read(path)
    assert [document.text for document in documents] == ["good", "whole 😀", "", "last"]
    assert [document.index for document in documents] == [0, 8, 10, 11]
    assert [record.line for record in rejected] == [2, 3, 4, 5, 7, 8, 10]
    reasons = [
        "invalid JSON",
        "invalid UTF-8",
        "no field 'text'",
        "no field",
        "no text but int",
        "surrogate",
        "invalid",
    ]
    for record, reason in zip(rejected, reasons, strict=True):
        assert reason in record.reason
        assert record.path == str(path)
        assert record.raw == lines[record.line - 1] + b"\n"


def test_a_folder_of_sources(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "b" / "z.py").write_text("def z():\n    pass\n")
    (tmp_path / "b" / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "b" / ".hidden.py").write_text("hidden")
    (tmp_path / "b" / "latin.txt").write_bytes(b"first\ncaf\xe9\n")
    (tmp_path / "a.txt").write_text("a file is a document\n")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"opened"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "rows.jsonl").write_bytes(as_lines(["row 1", "row 2"]))
    documents, rejected = read(tmp_path)
    assert [(Path(d.source).name, d.text) for d in documents] == [
        ("a.txt", "a file is a document\n"),
        ("z.py", "def z():\n    pass\n"),
        ("c.txt.gz", "opened"),
        ("rows.jsonl", "row 1"),
        ("rows.jsonl", "row 2"),
    ]
    passed_over = {Path(r.path).name: r.reason for r in rejected if r.raw is None}
    assert passed_over == {"config": "hidden file", ".hidden.py": "hidden file", "image.png": "binary file"}
    broken = [(Path(r.path).name, r.line, r.raw) for r in rejected if r.raw is not None]
    assert broken == [("latin.txt", 2, b"first\ncaf\xe9\n")]


def test_a_folder_below_a_hidden_one_is_not_hidden(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "corpus"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("seen")
    assert [document.text for document in read(folder)[0]] == ["seen"]


def test_paths_follow_each_other_and_bytes_add_up(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(as_lines(["first"])))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["third"], "id": [3]}), tmp_path / "c.parquet")
    paths = [str(tmp_path / name) for name in ("a.jsonl.gz", "b.txt", "c.parquet")]
    counts: list[int] = []
    documents = list(read_documents(corpus_of(paths), on_bytes=counts.append))
    assert [document.text for document in documents] == ["first", "second", "third"]
    assert sum(counts) == corpus_bytes(corpus_of(paths)) == sum(Path(path).stat().st_size for path in paths)


def test_a_whole_text_is_one_document_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    content = "\ufeffline\r\n" * 10_000 + "  end"
    path.write_bytes(content.encode())
    assert read(path)[0] == [Document(content, str(path), 0)]


@pytest.mark.parametrize("name", ["nowhere", "no/where/at/all", "no/where.jsonl", "nowhere.txt.gz"])
def test_a_missing_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"input {name} does not exist"):
        read(name)
    with pytest.raises(ValueError, match="does not exist"):
        corpus_bytes(corpus_of([str(tmp_path / name)]))


def test_a_mistyped_path_beside_its_folder_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="input data/corpsu does not exist"):
        read("data/corpsu")


def test_a_hub_name_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"steppe-tests/none is neither a path nor a Hugging Face dataset"):
        read("steppe-tests/none")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"no json\n\xff\n"])
def test_no_document_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"no document in .*c\.jsonl \(\d broken records, 0 files passed over\)"):
        read(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no document in"):
        read(tmp_path / "empty")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, compress_zst])
def test_all_members_of_an_archive_are_read(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    suffix = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz"}.get(compress, "zst")
    path = tmp_path / f"c.jsonl.{suffix}"
    path.write_bytes(b"".join(compress(as_lines([text])) for text in TEXTS))
    assert texts_of(path) == TEXTS


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "c.txt.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbffirst\r\n\n  second \nbad \xff\nlast"))
    rejected: list[Rejected] = []
    documents = list(read_file(*only_file(path, format="lines"), on_bad=rejected.append))
    assert [(document.index, document.text) for document in documents] == [(0, "first"), (2, "  second "), (4, "last")]
    assert [(record.line, record.raw) for record in rejected] == [(4, b"bad \xff\n")]


ROWS = [
    {"text": "a", "lang": "en", "score": 0.5, "meta": {"source": "web", "ok": True}},
    {"text": "b", "lang": "de", "score": 0.7, "meta": {"source": "web", "ok": True}},
    {"text": "cc", "lang": "en", "score": 0.9, "meta": {"source": "books", "ok": False}},
    {"text": "d", "lang": None, "score": "high", "meta": "none", "date": "2024-02-01"},
]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({}, "a b cc d"),
        ({"lang": "en"}, "a cc"),
        ({"lang": {"in": ["de", None]}}, "b d"),
        ({"score": {"min": 0.7}}, "b cc"),
        ({"score": {"min": 0.5, "max": 0.7}, "lang": "en"}, "a"),
        ({"meta.source": {"in": ["books", "news"]}}, "cc"),
        ({"meta.ok": True}, "a b"),
        ({"date": {"min": "2024-01-01", "max": "2025"}}, "d"),
        ({"absent": None}, "a b cc d"),
        ({"absent": 1}, ""),
    ],
)
def test_conditions_on_fields(tmp_path: Path, where: dict[str, object], kept: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    left_out: list[int] = []
    documents = list(read_file(*only_file(path, where=where), on_left_out=left_out.append))
    assert [document.text for document in documents] == kept.split()
    assert sum(left_out) + sum(len(document.text) for document in documents) == 5
    assert len(left_out) + len(documents) == 4


def test_a_text_inside_another_field(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"doc": {"body": "inner"}}\n{"doc": "flat"}\n{"doc.body": "dotted"}\n')
    assert texts_of(path, text_field="doc.body") == ["inner", "dotted"]


def test_a_corpus_of_which_nothing_meets_the_conditions_says_so(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(as_lines(TEXTS))
    corpus = CorpusConfig(inputs=(InputConfig.model_validate({"path": str(path), "where": {"lang": "en"}}),))
    with pytest.raises(ValueError, match="4 documents left out by where"):
        list(read_documents(corpus))


def test_documents_are_grouped_by_a_field(tmp_path: Path) -> None:
    values = ["en", 3, 0.5, True, None, "", ["en"], {"x": 1}, "left out"]
    rows = [{"text": f"text {at}", "meta": {"lang": value}, "keep": at < 8} for at, value in enumerate(values)]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "text 9", "keep": True}]))
    corpus = CorpusConfig(inputs=(InputConfig.model_validate({"path": str(path), "where": {"keep": True}}),))
    rejected: list[Rejected] = []
    left_out: list[int] = []
    by_language = Grouping(by_field="meta.lang")
    documents = list(read_documents(corpus, rejected.append, on_left_out=left_out.append, grouping=by_language))
    assert [(document.index, document.group) for document in documents] == [
        (0, "en"),
        (1, "3"),
        (2, "0.5"),
        (3, "true"),
    ]
    assert [(record.line, record.reason) for record in rejected] == [
        (5, "no field 'meta.lang' to group by"),
        (6, "field 'meta.lang', to group by, is empty"),
        (7, "field 'meta.lang', to group by, is no text or number but list"),
        (8, "field 'meta.lang', to group by, is no text or number but dict"),
        (10, "no field 'meta.lang' to group by"),
    ]
    assert [record.raw for record in rejected] == [f"text {at}".encode() for at in (4, 5, 6, 7, 9)]
    assert left_out == [6]
    assert {document.group for document in read_documents(corpus)} == {None}


def test_documents_are_grouped_by_folder(tmp_path: Path) -> None:
    for name in ("a.txt", "en/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    documents = read_documents(corpus_of([tmp_path]), grouping=Grouping(by_folder=True))
    assert [(document.text, document.group) for document in documents] == [("a.txt", "."), ("en/b.txt", "en")]


def test_plain_text_has_no_field_to_group_by(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="a.txt is plain text, which has no field 'lang' to group by: group by folder"):
        list(read_documents(corpus_of([tmp_path]), grouping=Grouping(by_field="lang")))


def test_a_file_that_changes_is_no_corpus(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(as_lines(TEXTS))
    file, input_ = only_file(path)
    reader = read_file(file, input_)
    next(reader)
    with path.open("ab") as more:
        more.write(as_lines(["late"]))
    with pytest.raises(ValueError, match=r"c\.jsonl changed while it was read"):
        list(reader)
    with pytest.raises(ValueError, match=r"c\.jsonl changed after it was listed"):
        list(read_file(file, input_))
    path.unlink()
    with pytest.raises(ValueError, match="there is no such file"):
        list(read_file(file, input_))


def test_no_error_quotes_a_text(tmp_path: Path) -> None:
    secret = "Erika Mustermann"
    lines = [f'{{"text": "{secret}', f'{{"text": "{secret}"}} {secret}', f'["{secret}"]', f'{{"text": ["{secret}"]}}']
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(lines))
    rejected: list[Rejected] = []
    with pytest.raises(ValueError, match="no document") as error:
        list(read_documents(corpus_of([path]), rejected.append))
    assert len(rejected) == 4
    assert all("Erika" not in reason for reason in [str(error.value), *(record.reason for record in rejected)])
