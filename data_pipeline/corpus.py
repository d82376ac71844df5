"""Documents out of files: plain text, source folders, JSON lines, parquet, and datasets on the Hugging Face hub.

What cannot be read is reported record by record and never ends a job; what would silently shorten a corpus, such as a
truncated archive, does.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec

from data_pipeline.streams import COMPRESSION_SUFFIXES, OnBytes, open_stream, split_compression

LINE_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
SNIFF_BYTES = 8192
JSON_SPACE = " \t\r\n"
DECODER = json.JSONDecoder()
ROWS_PER_READ = 1024
FILE_SUFFIXES = (*LINE_SUFFIXES, *PARQUET_SUFFIXES, *COMPRESSION_SUFFIXES, ".txt", ".json", ".csv", ".md", ".py")
"""What ends so is a file's name, though it has the form of a hub name."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its text, the file (or hub name) it came from, and its number within that, from 0."""

    text: str
    source: str
    index: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that is no document."""

    path: str
    line: int
    """Line of a text file or row of a table, from 1; 0 for a whole file."""
    reason: str
    raw: bytes | None
    """What stood there. None for a file that was passed over: it is still where it was."""


OnBad = Callable[[Rejected], None]


def read_documents(
    paths: Sequence[str],
    text_field: str = "text",
    on_bad: OnBad = lambda rejected: None,
    on_bytes: OnBytes = lambda count: None,
) -> Iterator[Document]:
    """Stream the documents of each path in turn, folders in the order of their names.

    A path is a file, a folder, a URL that fsspec opens, or a dataset's name `owner/name` on the Hugging Face hub (its
    train split). `.jsonl` and `.parquet` hold one document a row in `text_field`; any other file is one document.
    `.gz`, `.zst`, `.bz2` and `.xz` are opened. In a folder, hidden and binary files are passed over.

    `on_bad` is told of each record that is no UTF-8, no JSON, or has no text; `on_bytes` of the file bytes read since
    the last call.

    Raises:
        ValueError: a path does not exist, an archive or a table is damaged, or no document was found at all.
    """
    sources = [_Source(path) for path in paths]
    documents = rejected = skipped = 0

    def reject(record: Rejected) -> None:
        nonlocal rejected, skipped
        rejected, skipped = rejected + (record.raw is not None), skipped + (record.raw is None)
        on_bad(record)

    for source in sources:
        for document in source.documents(text_field, reject, on_bytes):
            documents += 1
            yield document
    if not documents:
        raise ValueError(
            f"no document in {', '.join(paths)} ({rejected} broken records, {skipped} files passed over): "
            f"check the path and --text-field (now {text_field!r})"
        )


def corpus_bytes(paths: Sequence[str]) -> int | None:
    """Bytes of the files that `read_documents` will read; None where a hub dataset does not say."""
    sources = [_Source(path) for path in paths]
    if any(source.is_hub for source in sources):
        return None
    return sum(source.fs.size(file) for source in sources for file in source.files())


class _Source:
    """One of the paths: what it is, and how to read it."""

    def __init__(self, path: str) -> None:
        self.path = str(path)
        self.fs, self.root = fsspec.core.url_to_fs(self.path)
        self.is_hub = False
        if not self.fs.exists(self.root):
            self.is_hub = self._may_be_hub_name()
            if not self.is_hub:
                raise ValueError(f"input {self.path} does not exist: check the path")
        self.is_folder = not self.is_hub and self.fs.isdir(self.root)

    def _may_be_hub_name(self) -> bool:
        owner, _, rest = self.path.partition("/")
        # Beside a folder of the owner's name, a path with a typing error is likelier.
        is_file_name = self.path.endswith(FILE_SUFFIXES) or self.fs.exists(owner)
        return bool(rest) and HUB_NAME.fullmatch(self.path) is not None and not is_file_name

    def files(self) -> list[str]:
        return sorted(self.fs.find(self.root)) if self.is_folder else [self.root]

    def documents(self, text_field: str, on_bad: OnBad, on_bytes: OnBytes) -> Iterator[Document]:
        if self.is_hub:
            yield from _table_documents(self._hub_dataset(), self.path, text_field, on_bad)
            return
        for file in self.files():
            inner = file[len(self.root) :] if self.is_folder else ""
            if any(part.startswith(".") for part in inner.split("/")):
                on_bad(Rejected(file, 0, "hidden file", None))
                continue
            yield from self._file_documents(file, text_field, on_bad, on_bytes)

    def _file_documents(self, file: str, text_field: str, on_bad: OnBad, on_bytes: OnBytes) -> Iterator[Document]:
        stem = split_compression(file)[0]
        if stem.endswith(PARQUET_SUFFIXES):
            yield from _table_documents(_parquet_dataset(file, self.fs), file, text_field, on_bad)
            on_bytes(self.fs.size(file))
            return
        with self.fs.open(file, "rb") as raw:
            stream = open_stream(raw, file, on_bytes)
            if stem.endswith(LINE_SUFFIXES):
                yield from _line_documents(stream, file, text_field, on_bad)
            else:
                yield from _whole_document(stream, file, on_bad)

    def _hub_dataset(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self.path, split="train", streaming=True)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"input {self.path} is neither a path nor a Hugging Face dataset with a train split: {reason}"
            ) from error


def _line_documents(stream: BinaryIO, file: str, text_field: str, on_bad: OnBad) -> Iterator[Document]:
    """One JSON object a line. Our own reading, since that of `datasets` ends the job at the first broken line."""
    index = 0
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.isspace():
            continue
        try:
            text = _line_text(line, text_field)
        except _BadRecordError as error:
            on_bad(Rejected(file, number, str(error), line))
            continue
        yield Document(text, file, index)
        index += 1


class _BadRecordError(Exception):
    """Says why a record is no document."""


def _line_text(line: bytes, text_field: str) -> str:
    try:
        content = line.decode().strip(JSON_SPACE)
        record, end = DECODER.raw_decode(content)
        if end != len(content):
            raise ValueError(f"more follows the object at character {end}")
    except UnicodeDecodeError as error:
        raise _BadRecordError(f"invalid UTF-8 at byte {error.start} of the line") from error
    except (ValueError, RecursionError) as error:
        raise _BadRecordError(f"invalid JSON: {error}") from error
    if not isinstance(record, dict) or text_field not in record:
        raise _BadRecordError(f"no field {text_field!r}")
    text = record[text_field]
    if not isinstance(text, str):
        raise _BadRecordError(f"field {text_field!r} is no text but {type(text).__name__}")
    # JSON can escape half of a surrogate pair, which has no UTF-8 form. Only such an escape can bring one in.
    if rb"\ud" in line or rb"\uD" in line:
        _require_utf8(text, text_field)
    return text


def _require_utf8(text: str, text_field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _BadRecordError(f"field {text_field!r} holds a lone surrogate at character {error.start}") from error


def _whole_document(stream: BinaryIO, file: str, on_bad: OnBad) -> Iterator[Document]:
    head = stream.read(SNIFF_BYTES)
    if b"\0" in head:
        on_bad(Rejected(file, 0, "binary file", None))
        return
    content = head + stream.read()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        on_bad(Rejected(file, line, f"invalid UTF-8 at byte {error.start}", content))
        return
    if text:
        yield Document(text, file, 0)


def _parquet_dataset(file: str, fs: fsspec.AbstractFileSystem) -> Any:
    import datasets

    try:
        return datasets.load_dataset("parquet", data_files=fs.unstrip_protocol(file), split="train", streaming=True)
    except Exception as error:
        raise ValueError(f"input {file} is no readable parquet file ({error}): fetch it again") from error


def _table_documents(dataset: Any, file: str, text_field: str, on_bad: OnBad) -> Iterator[Document]:
    """Rows of a streamed dataset, taken as arrow tables: the text is checked as bytes, since arrow itself does not."""
    import pyarrow

    row = index = 0
    try:
        for table in dataset.with_format("arrow").iter(batch_size=ROWS_PER_READ):
            if text_field not in table.column_names:
                columns = ", ".join(table.column_names)
                raise ValueError(f"input {file} has no column {text_field!r}: name one of {columns} with --text-field")
            for value in table[text_field].cast(pyarrow.large_binary()).to_pylist():
                row += 1
                if value is None:
                    on_bad(Rejected(file, row, f"no field {text_field!r}", b""))
                    continue
                try:
                    text = value.decode()
                except UnicodeDecodeError as error:
                    on_bad(Rejected(file, row, f"invalid UTF-8 at byte {error.start} of the text", value))
                    continue
                yield Document(text, file, index)
                index += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"input {file} cannot be read as a table of texts ({error}): fetch it again") from error
