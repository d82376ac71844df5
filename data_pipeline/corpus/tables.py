"""Rows of parquet and arrow files, and of anything else that comes as arrow tables, batch by batch.

Texts are taken as bytes and decoded here, since arrow does not check that they are UTF-8.
"""

import io
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from data_pipeline.corpus.compression import is_failure_of_store
from data_pipeline.corpus.document import Rejected
from data_pipeline.corpus.records import Record, Records

if TYPE_CHECKING:
    import pyarrow

ROWS_PER_READ = 256
"""Few, since a row may be a book."""
COLUMN_READ_BYTES = 1 << 20
FILE_MAGIC = b"ARROW1"
"""An arrow file begins so; without it the same messages are an arrow stream, as `datasets` saves them."""

Value = TypeVar("Value")


def parquet_tables(stored: io.BufferedReader, source: str, columns: Collection[str]) -> "Iterator[pyarrow.Table]":
    """The batches of a parquet file, of the columns named only: the others are not read."""
    import pyarrow
    import pyarrow.parquet

    # Without pre-buffering, a column is read through a window rather than a row group at a time.
    file = _or_damaged(
        lambda: pyarrow.parquet.ParquetFile(stored, pre_buffer=False, buffer_size=COLUMN_READ_BYTES), source, "parquet"
    )
    _require_columns(file.schema_arrow, source, columns)
    batches = file.iter_batches(ROWS_PER_READ, columns=sorted(columns), use_threads=False)
    while (batch := _or_damaged(lambda: next(batches, None), source, "parquet")) is not None:
        yield pyarrow.Table.from_batches([batch])


def arrow_tables(stored: io.BufferedReader, source: str, columns: Collection[str]) -> "Iterator[pyarrow.Table]":
    """The record batches of an arrow file or stream, in slices."""
    import pyarrow
    import pyarrow.ipc

    magic = stored.read(len(FILE_MAGIC))
    stored.seek(0)
    reader: Any
    if magic == FILE_MAGIC:
        reader = _or_damaged(lambda: pyarrow.ipc.open_file(stored), source, "arrow")
        batches = map(reader.get_batch, range(reader.num_record_batches))
    else:
        reader = _or_damaged(lambda: pyarrow.ipc.open_stream(stored), source, "arrow")
        batches = iter(reader)
    _require_columns(reader.schema, source, columns)
    while (batch := _or_damaged(lambda: next(batches, None), source, "arrow")) is not None:
        for start in range(0, batch.num_rows, ROWS_PER_READ):
            yield pyarrow.Table.from_batches([batch.slice(start, ROWS_PER_READ)])


def _or_damaged(read: Callable[[], Value], source: str, kind: str) -> Value:
    import pyarrow

    try:
        return read()
    except (pyarrow.ArrowException, OSError) as error:
        if is_failure_of_store(error):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"input {source} is no readable {kind} file ({reason}): fetch it again") from error


def table_records(tables: "Iterable[pyarrow.Table]", source: str, text_field: str, beside: Collection[str]) -> Records:
    """The rows of the tables, counted through all of them. `beside`: the fields that records are to have.

    Raises ValueError where a column is missing, or holds no texts.
    """
    import pyarrow

    row = 0
    for table in tables:
        _require_columns(table.schema, source, [text_field, *beside])
        try:
            texts = _plain(_column(table, text_field)).cast(pyarrow.large_binary()).to_pylist()
        except pyarrow.ArrowException as error:
            raise ValueError(f"input {source} has no texts in its column {text_field!r}: name another field") from error
        conditions = [_column(table, name).to_pylist() for name in beside]
        for place, value in enumerate(texts):
            row += 1
            if value is None:
                yield Rejected(source, row, f"no field {text_field!r}", b"")
                continue
            try:
                text = value.decode()
            except UnicodeDecodeError as error:
                yield Rejected(source, row, f"invalid UTF-8 at byte {error.start} of the text", value)
                continue
            fields: Mapping[str, Any] = {name: values[place] for name, values in zip(beside, conditions, strict=True)}
            yield Record(text, row - 1, fields)


def _require_columns(schema: "pyarrow.Schema", source: str, columns: Iterable[str]) -> None:
    for column in columns:
        if _path_in(schema, column) is None:
            raise ValueError(
                f"input {source} has no column {column!r}: name one of {', '.join(schema.names)} with --text-field "
                "or --by-field, or in text_field and where"
            )


def _path_in(schema: "pyarrow.Schema", name: str) -> list[str] | None:
    """The column, then the fields inside it, that a name such as `meta.language` leads to."""
    import pyarrow

    if name in schema.names:
        return [name]
    outer, *inner = name.split(".")
    if outer not in schema.names:
        return None
    type_ = schema.field(outer).type
    for part in inner:
        if not pyarrow.types.is_struct(type_) or type_.get_field_index(part) < 0:
            return None
        type_ = type_.field(part).type
    return [outer, *inner]


def _column(table: "pyarrow.Table", name: str) -> "pyarrow.ChunkedArray":
    import pyarrow.compute

    path = _path_in(table.schema, name)
    assert path is not None
    column = table.column(path[0])
    return pyarrow.compute.struct_field(column, path[1:]) if path[1:] else column


def _plain(column: "pyarrow.ChunkedArray") -> "pyarrow.ChunkedArray":
    import pyarrow

    return column.cast(column.type.value_type) if pyarrow.types.is_dictionary(column.type) else column
