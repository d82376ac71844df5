from pathlib import Path

import pytest

from data_pipeline.corpus.config import InputConfig, corpus_of
from data_pipeline.corpus.document import Rejected
from data_pipeline.corpus.formats import format_of
from data_pipeline.corpus.listing import InputFile, corpus_bytes, first_folder, list_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.txt", "sub/c.parquet", "sub/.git/config", ".hidden", "sub/deep/d.warc.wet.gz"):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * len(name))
    return tmp_path / "corpus"


def listed(path: Path | str, **words: str) -> tuple[list[InputFile], list[str]]:
    passed_over: list[Rejected] = []
    files = list_files(InputConfig.model_validate({"path": str(path), **words}), passed_over.append)
    assert all(record.raw is None and record.reason == "hidden file" for record in passed_over)
    return files, [Path(record.path).name for record in passed_over]


def test_files_of_a_folder(folder: Path) -> None:
    files, passed_over = listed(folder)
    assert [(str(Path(f.path).relative_to(folder)), f.format) for f in files] == [
        ("a.txt", "text"),
        ("b.jsonl", "jsonl"),
        ("sub/c.parquet", "parquet"),
        ("sub/deep/d.warc.wet.gz", "wet"),
    ]
    assert passed_over == [".hidden", "config"]
    assert all(file.is_local and file.size == Path(file.path).stat().st_size and file.tag for file in files)
    assert corpus_bytes(corpus_of([folder])) == sum(file.size or 0 for file in files)
    assert {file.format for file in listed(folder, format="lines")[0]} == {"lines"}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", ["a.txt", "b.jsonl"]),
        ("*.jsonl", ["b.jsonl"]),
        ("[ab].*", ["a.txt", "b.jsonl"]),
        ("sub/**", ["c.parquet", "d.warc.wet.gz"]),
        ("**/*.gz", ["d.warc.wet.gz"]),
    ],
)
def test_patterns(folder: Path, pattern: str, names: list[str]) -> None:
    assert [Path(file.path).name for file in listed(f"{folder}/{pattern}")[0]] == names


def test_a_pattern_that_matches_nothing(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"\*\.csv matches no file: check the pattern"):
        listed(folder / "*.csv")


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "a[1]*.txt"
    path.write_text("x")
    assert [file.path for file in listed(path)[0]] == [str(path)]


def test_an_empty_folder_has_no_files(tmp_path: Path) -> None:
    assert listed(tmp_path) == ([], [])


def test_a_file_that_changes_is_another(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    first = listed(path)[0]
    assert listed(path)[0] == first
    path.write_text("yy")
    assert listed(path)[0] != first


def test_the_folder_that_a_file_lies_in(folder: Path) -> None:
    def folders(path: Path | str) -> list[str]:
        input_ = InputConfig(path=str(path))
        return [first_folder(file, input_) for file in list_files(input_)]

    assert folders(folder) == folders(f"{folder}/") == folders(f"file://{folder}") == [".", ".", "sub", "sub"]
    assert folders(f"{folder}/**/*.gz") == ["sub"]
    assert folders(f"{folder}/sub/**") == [".", "deep"]
    assert folders(f"{folder.parent}/c*/sub/**") == ["corpus", "corpus"]
    assert folders(folder / "a.txt") == ["."]
    assert first_folder(InputFile("owner/name", "hub", None, "commit"), InputConfig(path="owner/name")) == "."


def test_token_shards_are_no_text(folder: Path) -> None:
    for name in ("manifest.json", "shard_00000.bin", "shard_00000.idx"):
        (folder / "sub" / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"corpus holds token shards, .* or for an evaluation {folder}/sub"):
        list_files(InputConfig(path=str(folder)))
    assert len(list_files(InputConfig(path=str(folder), format="text"))) == 7
    (folder / "sub" / "shard_00000.idx").unlink()
    assert len(list_files(InputConfig(path=str(folder)))) == 6  # another's manifest.json is a text


@pytest.mark.parametrize(
    ("name", "format_"),
    [
        ("a.jsonl", "jsonl"),
        ("a.ndjson.zst", "jsonl"),
        ("c4-train.00000-of-01024.json.gz", "jsonl"),
        ("package.json", "text"),
        ("a.parquet", "parquet"),
        ("data-00000-of-00001.arrow", "arrow"),
        ("CC-MAIN-20241003094020-00000.warc.gz", "warc"),
        ("CC-MAIN-20241003094020-00000.warc.wet.gz", "wet"),
        ("book.txt.xz", "text"),
        ("README", "text"),
    ],
)
def test_formats_by_name(name: str, format_: str) -> None:
    assert format_of(name) == format_


def test_a_folder_of_a_web_server_is_no_document() -> None:
    with pytest.raises(ValueError, match="http://127.0.0.1:9/texts/ is a folder of a web server.*name its files"):
        list_files(InputConfig(path="http://127.0.0.1:9/texts/"))
