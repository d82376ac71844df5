import gzip
import sys
from pathlib import Path

import pytest

from data_pipeline.corpus.document import Rejected
from data_pipeline.corpus.reading import read_file
from tests.unit.data_pipeline.corpus.reading_helpers import only_file, texts_of

PAGE = """<!doctype html><html><head><title>A title</title><script>var x = 1;</script></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/about">About</a></li></ul></nav>
<article><h1>{title}</h1><p>{text}</p></article><footer>Imprint</footer></body></html>"""
TEXT = "The first paragraph of the article is long enough to be its main content, as pages go."


def record(type_: str, block: bytes, content_type: str = "application/http; msgtype=response", **more: str) -> bytes:
    headers = {
        "WARC-Type": type_,
        "WARC-Record-ID": "<urn:uuid:00000000-0000-0000-0000-000000000001>",
        "WARC-Date": "2024-01-01T00:00:00Z",
        "WARC-Target-URI": "https://example.org/",
        "Content-Type": content_type,
        **{name.replace("_", "-"): value for name, value in more.items()},
        "Content-Length": str(len(block)),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"WARC/1.0\r\n{head}\r\n".encode() + block + b"\r\n\r\n"


def response(body: bytes, type_: str = "text/html; charset=utf-8", status: int = 200, more: str = "") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {type_}\r\n{more}\r\n"
    return record("response", head.encode() + body)


def page(title: str, text: str = TEXT, encoding: str = "utf-8") -> bytes:
    return PAGE.format(title=title, text=text).encode(encoding)


RECORDS = [
    record("warcinfo", b"software: test\r\n", "application/warc-fields"),
    record("request", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request"),
    response(page("One")),
    response(page("Zwölf", encoding="latin-1"), "text/html; charset=ISO-8859-1"),
    response(b"<meta charset=windows-1251>" + page("Раз", encoding="cp1251"), "text/html"),
    response(gzip.compress(page("Packed")), more="Content-Encoding: gzip\r\n"),
    response(b"%x\r\n%s\r\n0\r\n\r\n" % (len(page("Chunks")), page("Chunks")), more="Transfer-Encoding: chunked\r\n"),
    response(page("Missing"), status=404),
    response(b"\x89PNG\0", "image/png"),
    response(b"<html><body></body></html>"),
    response(page("Broken chunks"), more="Transfer-Encoding: chunked\r\n"),
    record("metadata", b"fetchTimeMs: 1", "application/warc-fields"),
    response(page("Last \ufffd"), "text/html; charset=no-such-thing"),
]


def write_archive(path: Path, records: list[bytes]) -> Path:
    """As crawls are stored: each record a member of its own."""
    path.write_bytes(b"".join(map(gzip.compress, records)) if path.suffix == ".gz" else b"".join(records))
    return path


@pytest.mark.parametrize("name", ["c.warc.gz", "c.warc"])
def test_pages_of_a_crawl(tmp_path: Path, name: str) -> None:
    rejected: list[Rejected] = []
    path = write_archive(tmp_path / name, RECORDS)
    documents = list(read_file(*only_file(path), on_bad=rejected.append))
    titles = {2: "One", 3: "Zwölf", 4: "Раз", 5: "Packed", 6: "Chunks", 12: "Last \ufffd"}
    assert {document.index: document.text for document in documents} == {
        index: f"{title}\n\n{TEXT}" for index, title in titles.items()
    }
    assert [(r.line, r.reason, bool(r.raw)) for r in rejected] == [
        (10, "a page without text", False),
        (11, "a page that cannot be decoded", True),
    ]


def wet(text: bytes, language: str) -> bytes:
    return record("conversion", text, "text/plain", WARC_Identified_Content_Language=language)


def test_extracted_texts_and_conditions_on_their_headers(tmp_path: Path) -> None:
    records = [
        record("warcinfo", b"", "application/warc-fields"),
        wet(b"english\n", "eng"),
        wet("français\n".encode(), "fra"),
        wet(b"bad \xff", "eng"),
        wet(b"both", "eng,fra"),
    ]
    path = write_archive(tmp_path / "c.warc.wet.gz", records)
    rejected: list[Rejected] = []
    documents = list(read_file(*only_file(path), on_bad=rejected.append))
    assert [(d.index, d.text) for d in documents] == [(1, "english\n"), (2, "français\n"), (4, "both")]
    assert [(r.line, r.raw) for r in rejected] == [(4, b"bad \xff")]
    assert texts_of(path, where={"WARC-Identified-Content-Language": "fra"}) == ["français\n"]


def test_an_archive_that_ends_early_is_no_short_corpus(tmp_path: Path) -> None:
    content = b"".join(RECORDS[:4])
    complete = {0} | {sum(map(len, RECORDS[:n])) - end for n in range(1, 5) for end in (0, 2, 4)}
    for length in sorted({*range(0, len(content), 37), *complete}):
        path = tmp_path / f"{length}.warc"
        path.write_bytes(content[:length])
        if length in complete:
            texts_of(path)
        else:
            with pytest.raises(ValueError, match=r"\d+\.warc (is truncated or damaged|holds something else)"):
                texts_of(path)


@pytest.mark.parametrize("junk", [b"no archive", b"<html>", b"WARC/1.0\r\nWARC-Type: response\r\n\r\n"])
def test_what_is_no_archive(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "c.warc"
    path.write_bytes(RECORDS[2] + junk)
    with pytest.raises(ValueError, match=r"c\.warc (holds something else where|has a WARC record without a length)"):
        texts_of(path)


@pytest.mark.parametrize("package", ["fastwarc", "resiliparse"])
def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    module = {"fastwarc": "fastwarc.warc", "resiliparse": "resiliparse.extract.html2text"}[package]
    monkeypatch.setitem(sys.modules, module, None)  # which is how Python notes that there is none
    path = write_archive(tmp_path / "c.warc", RECORDS)
    with pytest.raises(ValueError, match=rf"c\.warc needs {package}: pip install 'steppe\[data\]'"):
        texts_of(path)
