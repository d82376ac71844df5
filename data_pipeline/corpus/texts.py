"""JSON lines, lines and whole texts out of a stream of bytes."""

import json
from collections.abc import Iterator
from typing import BinaryIO

from data_pipeline.corpus.document import Rejected
from data_pipeline.corpus.records import Record, Records, field_of

SNIFF_BYTES = 8192
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
JSON_SPACE = " \t\r\n"
DECODER = json.JSONDecoder()


def json_records(stream: BinaryIO, source: str, text_field: str) -> Records:
    """One JSON object a line. Our own reading, since that of `datasets` ends the job at the first broken line."""
    for index, line in _filled_lines(stream):
        try:
            yield _json_record(line, index, text_field)
        except _BadRecordError as error:
            yield Rejected(source, index + 1, str(error), line)


def _filled_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(number from 0, line) of those that are not empty."""
    for index, line in enumerate(stream):
        if index == 0:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line.isspace():
            yield index, line


class _BadRecordError(Exception):
    """Says why a record is no document."""


def _json_record(line: bytes, index: int, text_field: str) -> Record:
    try:
        content = line.decode().strip(JSON_SPACE)
        fields, end = DECODER.raw_decode(content)
        if end != len(content):
            raise ValueError(f"more follows the object at character {end}")
    except UnicodeDecodeError as error:
        raise _BadRecordError(f"invalid UTF-8 at byte {error.start} of the line") from error
    except (ValueError, RecursionError) as error:
        raise _BadRecordError(f"invalid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise _BadRecordError(f"no field {text_field!r}")
    text = field_of(fields, text_field)
    if text is None:
        raise _BadRecordError(f"no field {text_field!r}")
    if not isinstance(text, str):
        raise _BadRecordError(f"field {text_field!r} is no text but {type(text).__name__}")
    # JSON can escape half of a surrogate pair, which has no UTF-8 form. Only such an escape can bring one in.
    if rb"\ud" in line or rb"\uD" in line:
        _require_utf8(text, text_field)
    return Record(text, index, fields)


def _require_utf8(text: str, text_field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _BadRecordError(f"field {text_field!r} holds a lone surrogate at character {error.start}") from error


def line_records(stream: BinaryIO, source: str) -> Records:
    """One text a line, without the line's end; empty lines are none."""
    for index, line in _filled_lines(stream):
        try:
            yield Record(line.rstrip(b"\r\n").decode(), index, {})
        except UnicodeDecodeError as error:
            yield Rejected(source, index + 1, f"invalid UTF-8 at byte {error.start} of the line", line)


def whole_text(stream: BinaryIO, source: str) -> Records:
    """A file that is one text, exactly as it stands; none if it is empty or binary."""
    head = stream.read(SNIFF_BYTES)
    if b"\0" in head:
        yield Rejected(source, 0, "binary file", None)
        return
    content = head + stream.read()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield Rejected(source, line, f"invalid UTF-8 at byte {error.start}", content)
        return
    if text:
        yield Record(text, 0, {})
