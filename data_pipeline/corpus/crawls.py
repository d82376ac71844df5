"""The text of web crawls: WARC archives of pages, WET archives of text that was extracted before (ISO 28500).

The records are taken apart here, so that an archive that ends early is told from one that is complete; what a server
sent is decoded by fastwarc, and pages become plain text by resiliparse's main-content extraction (Bevendorff et al.
2018; chosen for pretraining by Li et al. 2024, arXiv 2406.11794, section 4.2).
"""

import io
from collections.abc import Callable, Iterator
from typing import BinaryIO

from data_pipeline.corpus.document import Rejected
from data_pipeline.corpus.records import Record, Records

HEADER_BYTES = 1 << 16
PAGE_TYPES = ("text/html", "application/xhtml+xml")
VERSION = b"WARC/1."


def warc_records(stream: BinaryIO, source: str) -> Records:
    """The main text of each page (HTML that a server sent with status 200). Fields: the WARC headers of the record."""
    text_of_page = _page_reader(source)
    for index, (headers, head, block) in enumerate(_raw_records(stream, source)):
        if headers.get("WARC-Type") != "response" or not headers.get("Content-Type", "").startswith("application/http"):
            continue
        try:
            text = text_of_page(head + block)
        except (OSError, ValueError, LookupError):
            yield Rejected(source, index + 1, "a page that cannot be decoded", block)
            continue
        if text:
            yield Record(text, index, headers)
        elif text is not None:
            yield Rejected(source, index + 1, "a page without text", b"")


def wet_records(stream: BinaryIO, source: str) -> Records:
    """The text of each `conversion` record. Fields: its WARC headers."""
    for index, (headers, _, block) in enumerate(_raw_records(stream, source)):
        if headers.get("WARC-Type") != "conversion":
            continue
        try:
            yield Record(block.decode(), index, headers)
        except UnicodeDecodeError as error:
            yield Rejected(source, index + 1, f"invalid UTF-8 at byte {error.start} of the text", block)


def _raw_records(stream: BinaryIO, source: str) -> Iterator[tuple[dict[str, str], bytes, bytes]]:
    """Headers of each record, as a mapping and as they stand, and its block in full."""
    while True:
        line = stream.readline(HEADER_BYTES)
        while line in (b"\r\n", b"\n"):  # two of them end a record
            line = stream.readline(HEADER_BYTES)
        if not line:
            return
        if not line.startswith(VERSION):
            raise ValueError(f"input {source} holds something else where a WARC record should begin: fetch it again")
        head = [line]
        while line.strip():
            line = stream.readline(HEADER_BYTES)
            if not line.endswith(b"\n"):
                raise _truncated(source)
            head.append(line)
        headers = _parsed(head[1:-1])
        if not headers.get("Content-Length", "").isdecimal():
            raise ValueError(f"input {source} has a WARC record without a length: fetch it again")
        length = int(headers["Content-Length"])
        block = stream.read(length)
        if len(block) < length:
            raise _truncated(source)
        yield headers, b"".join(head), block


def _truncated(source: str) -> ValueError:
    return ValueError(f"input {source} is truncated or damaged (its last record is cut off): fetch it again")


def _parsed(lines: list[bytes]) -> dict[str, str]:
    pairs = (line.decode("utf-8", "replace").partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _page_reader(source: str) -> Callable[[bytes], str | None]:
    """Makes the function from a record with a server's response to the text of its page; None if that is no page."""
    try:
        from fastwarc.warc import ArchiveIterator
    except ImportError as error:
        raise ValueError(f"reading {source} needs fastwarc: pip install 'steppe[data]'") from error
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5
        from resiliparse.parse.html import HTMLTree
    except ImportError as error:
        raise ValueError(f"reading {source} needs resiliparse: pip install 'steppe[data]'") from error

    def text_of_page(record: bytes) -> str | None:
        response = next(iter(ArchiveIterator(io.BytesIO(record), parse_http=True, auto_decode="all")))
        headers = response.http_headers
        if headers is None or headers.status_code != 200 or response.http_content_type not in PAGE_TYPES:
            return None
        body = response.reader.read()
        # As browsers do: the server's word on the encoding goes before the page's, and what breaks it is replaced.
        declared = response.http_charset
        encoding = map_encoding_to_html5(declared) if declared else detect_encoding(body, from_html_meta=True)
        tree = HTMLTree.parse_from_bytes(body, encoding or "utf-8", errors="replace")
        return str(extract_plain_text(tree, main_content=True, alt_texts=False))

    return text_of_page
