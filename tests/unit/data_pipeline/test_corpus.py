import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.corpus import Document, Rejected, corpus_bytes, read_documents

TEXTS = ["one\n", "  zwei  ", "三 🎈", "four\r\n\tfive"]


def compress_zst(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def as_lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


def read(*paths: Path | str, text_field: str = "text") -> tuple[list[Document], list[Rejected]]:
    rejected: list[Rejected] = []
    return list(read_documents([str(path) for path in paths], text_field, rejected.append)), rejected


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
    assert [document.index for document in documents] == [0, 1, 2, 3]
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


def write_parquet(path: Path, texts: pyarrow.Array, field: str = "text") -> None:
    pyarrow.parquet.write_table(pyarrow.table({field: texts, "id": list(range(len(texts)))}), path)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    write_parquet(path, pyarrow.array([*TEXTS, None, "last"]), "content")
    documents, rejected = read(path, text_field="content")
    assert [document.text for document in documents] == [*TEXTS, "last"]
    assert [document.index for document in documents] == list(range(5))
    assert [(record.line, record.reason) for record in rejected] == [(5, "no field 'content'")]
    with pytest.raises(ValueError, match=r"no column 'text': name one of content, id with --text-field"):
        read(path)


def test_parquet_with_invalid_utf8(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    raw = pyarrow.array([b"good", b"bad \xff", b"too"], pyarrow.binary())
    write_parquet(path, pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers()))
    documents, rejected = read(path)
    assert [document.text for document in documents] == ["good", "too"]
    assert [(record.line, record.raw) for record in rejected] == [(2, b"bad \xff")]


@pytest.mark.parametrize("content", [b"no parquet at all", b"PAR1" + bytes(100) + b"PAR1"])
def test_damaged_parquet(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.parquet"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.parquet"):
        read(path)


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
    write_parquet(tmp_path / "c.parquet", pyarrow.array(["third"]))
    paths = [str(tmp_path / name) for name in ("a.jsonl.gz", "b.txt", "c.parquet")]
    counts: list[int] = []
    documents = list(read_documents(paths, on_bytes=counts.append))
    assert [document.text for document in documents] == ["first", "second", "third"]
    assert sum(counts) == corpus_bytes(paths) == sum(Path(path).stat().st_size for path in paths)


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
        corpus_bytes([str(tmp_path / name)])


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
    assert corpus_bytes(["steppe-tests/none"]) is None


@pytest.mark.parametrize("content", [b"", b"\n\n", b"no json\n\xff\n"])
def test_no_document_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"no document in .*c\.jsonl \(\d broken records, 0 files passed over\)"):
        read(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no document in"):
        read(tmp_path / "empty")
