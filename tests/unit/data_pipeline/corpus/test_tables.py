import datetime
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from data_pipeline.corpus.reading import read_file
from tests.unit.data_pipeline.corpus.reading_helpers import TEXTS, only_file, read, texts_of


def write_parquet(path: Path, texts: pyarrow.Array, field: str = "text") -> None:
    pyarrow.parquet.write_table(pyarrow.table({field: texts, "id": list(range(len(texts)))}), path)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    write_parquet(path, pyarrow.array([*TEXTS, None, "last"]), "content")
    documents, rejected = read(path, text_field="content")
    assert [document.text for document in documents] == [*TEXTS, "last"]
    assert [document.index for document in documents] == [0, 1, 2, 3, 5]
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


ROWS: list[dict[str, Any]] = [
    {"text": "a", "meta": {"lang": "en", "score": 1.0}, "day": datetime.date(2024, 1, 1)},
    {"text": "b", "meta": {"lang": "de", "score": 2.0}, "day": datetime.date(2024, 2, 1)},
    {"text": "c", "meta": None, "day": datetime.date(2024, 3, 1)},
]


def as_arrow_file(table: pyarrow.Table, path: Path) -> None:
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def as_arrow_stream(table: pyarrow.Table, path: Path) -> None:
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


WRITERS: list[tuple[str, Callable[[pyarrow.Table, Path], None]]] = [
    ("c.parquet", pyarrow.parquet.write_table),
    ("c.arrow", as_arrow_file),
    ("c.arrow", as_arrow_stream),
]


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_conditions_and_fields_inside_fields(
    tmp_path: Path, name: str, write: Callable[[pyarrow.Table, Path], None]
) -> None:
    path = tmp_path / name
    write(pyarrow.Table.from_pylist(ROWS), path)
    assert texts_of(path) == ["a", "b", "c"]
    assert texts_of(path, where={"meta.lang": "de"}) == ["b"]
    assert texts_of(path, where={"meta.score": {"max": 1}}) == ["a"]
    assert texts_of(path, where={"day": {"min": "2024-02-01"}}) == ["b", "c"]
    assert texts_of(path, text_field="meta.lang") == ["en", "de"]
    with pytest.raises(ValueError, match=r"no column 'meta.url': name one of text, meta, day"):
        texts_of(path, where={"meta.url": "x"})
    with pytest.raises(ValueError, match="no texts in its column 'meta'"):
        texts_of(path, text_field="meta")


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_many_rows_are_numbered_through(
    tmp_path: Path, name: str, write: Callable[[pyarrow.Table, Path], None]
) -> None:
    path = tmp_path / name
    texts = [f"text {i}" for i in range(1000)]
    write(pyarrow.table({"text": pyarrow.array(texts).dictionary_encode(), "other": texts}), path)
    counts: list[int] = []
    documents = list(read_file(*only_file(path), on_bytes=counts.append))
    assert [(document.index, document.text) for document in documents] == list(enumerate(texts))
    assert sum(counts) == path.stat().st_size


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_damage(tmp_path: Path, name: str, write: Callable[[pyarrow.Table, Path], None]) -> None:
    path = tmp_path / name
    write(pyarrow.table({"text": [f"{i} Erika" * 9 for i in range(20_000)]}), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"c\.\w+ is no readable \w+ file .*: fetch it again") as error:
        texts_of(path)
    assert "Erika" not in str(error.value)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"c\.\w+ is no readable \w+ file"):
        texts_of(path)


def test_a_dataset_that_was_saved(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"text": [*TEXTS, "last"]})
    dataset.save_to_disk(tmp_path / "one", num_shards=2)
    documents, rejected = read(tmp_path / "one")
    assert [document.text for document in documents] == [*TEXTS, "last"]
    assert {Path(document.source).suffix for document in documents} == {".arrow"}
    assert not rejected
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"splits holds a dataset's splits: choose one, such as .*/splits/test"):
        read(tmp_path / "splits")
    assert len(read(tmp_path / "splits" / "train")[0]) == 5


def test_a_row_group_is_not_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    texts = pyarrow.array([f"{i:09}" * 100 for i in range(25_000)])  # 22 MB, too varied for a dictionary
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, use_dictionary=False, compression="none")
    del texts
    pool = pyarrow.default_memory_pool()
    before, highest = pool.bytes_allocated(), 0
    tracemalloc.start()
    for document in read_file(*only_file(path)):
        if document.index % 1000 == 0:
            highest = max(highest, pool.bytes_allocated() - before)
    highest += tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert highest < 10 << 20
