import gzip
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiobotocore.httpsession
import pyarrow
import pyarrow.parquet
import pytest
import s3fs

from data_pipeline import retries
from data_pipeline.corpus import compression, stored, tables
from data_pipeline.corpus.config import corpus_of
from data_pipeline.corpus.listing import list_files
from data_pipeline.corpus.reading import read_documents, read_file
from data_pipeline.retries import RemoteError
from tests.unit.data_pipeline.corpus.reading_helpers import as_lines, only_file, texts_of
from tests.unit.data_pipeline.servers import Fault, FileServer, file_server, point_at_s3, s3_server

PIECE_BYTES = 20_000
# Too varied to be compressed, so that each file has several pieces.
TEXTS = [f"{i} {random.Random(i).getrandbits(2000):x}" for i in range(400)]


@pytest.fixture(autouse=True)
def _small_pieces_and_short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(stored, "BUFFER_BYTES", 1000)
    monkeypatch.setattr(compression, "READ_BYTES", 1000)
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(retries, "ATTEMPTS", 5)


def parquet_of(texts: list[str]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"other": [f"{random.Random(text).getrandbits(10_000):x}" for text in texts], "text": texts})
    pyarrow.parquet.write_table(table, sink, row_group_size=100)
    return bytes(sink.getvalue())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(as_lines(TEXTS)))
    (tmp_path / "c.parquet").write_bytes(parquet_of(TEXTS))
    with file_server(tmp_path) as server:
        yield server


@pytest.fixture(params=["c.jsonl.gz", "c.parquet"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def size_of(server: FileServer, name: str) -> int:
    return (server.folder / name).stat().st_size


def test_a_file_is_read_in_pieces(server: FileServer, name: str) -> None:
    file, input_ = only_file(f"{server.url}/{name}")
    counts: list[int] = []
    assert [document.text for document in read_file(file, input_, on_bytes=counts.append)] == TEXTS
    assert sum(counts) == file.size == size_of(server, name)
    ranges = [request.range for request in server.gets()]
    assert None not in ranges
    assert len(ranges) > 5
    assert len(ranges) == len(set(ranges)) or name == "c.parquet"  # whose end is read first


def test_the_next_piece_is_fetched_while_one_is_read(server: FileServer) -> None:
    reader = read_file(*only_file(f"{server.url}/c.jsonl.gz"))
    next(reader)
    deadline = time.monotonic() + 10
    while len(server.gets()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [request.range for request in server.gets()] == ["bytes=0-19999", "bytes=20000-39999"]


def test_only_the_columns_asked_for_are_fetched(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "PIECE_BYTES", 5000)
    monkeypatch.setattr(tables, "COLUMN_READ_BYTES", 5000)
    assert texts_of(f"{server.url}/c.parquet") == TEXTS
    assert 5000 * len(server.gets()) < size_of(server, "c.parquet") / 2


def test_what_breaks_on_the_way_is_fetched_again(
    server: FileServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "ATTEMPTS", 20)  # a piece and the one ahead share the faults
    faults: list[Fault] = ["503", "reset", "truncated", "short"]
    file, input_ = only_file(f"{server.url}/{name}")
    server.faults.extend(faults)
    reader = read_file(file, input_)
    first = next(reader)
    for _ in range(3):
        server.faults.extend([*faults, "none"])
    assert [first.text, *(document.text for document in reader)] == TEXTS
    assert not server.faults


@pytest.mark.parametrize("sizes", [True, False])
def test_a_server_that_sends_whole_files_only(server: FileServer, name: str, sizes: bool) -> None:
    server.ranges, server.sizes = False, sizes
    file, input_ = only_file(f"{server.url}/{name}")
    assert file.size == (size_of(server, name) if sizes else None)
    server.faults.extend(["503", "truncated"] if sizes else ["503"])
    counts: list[int] = []
    assert [document.text for document in read_file(file, input_, on_bytes=counts.append)] == TEXTS
    assert not server.faults
    assert sizes is (sum(counts) == size_of(server, name)) or name == "c.jsonl.gz"


def test_a_server_that_stays_away(server: FileServer, name: str) -> None:
    file, input_ = only_file(f"{server.url}/{name}")
    server.always = "503"
    with pytest.raises(RemoteError, match=rf"{name} failed 5 times in .* HTTP status 503"):
        next(read_file(file, input_))


@pytest.mark.parametrize("fault", ["503", "reset", "truncated"])
def test_a_connection_that_keeps_breaking_is_no_damaged_file(server: FileServer, name: str, fault: Fault) -> None:
    reader = read_file(*only_file(f"{server.url}/{name}"))
    next(reader)
    server.faults.extend([fault] * 1000)
    with pytest.raises(RemoteError, match="failed 5 times"):
        list(reader)


def test_a_file_that_changes_meanwhile(server: FileServer, name: str) -> None:
    server.etags[f"/{name}"] = '"one"'
    file, input_ = only_file(f"{server.url}/{name}")
    assert file.tag == '"one"'
    reader = read_file(file, input_)
    next(reader)
    server.etags[f"/{name}"] = '"two"'  # of the same size and bytes, but who knows
    with pytest.raises(ValueError, match=rf"{name} changed while it was read: start again"):
        list(reader)
    with pytest.raises(ValueError, match="changed after it was listed"):
        next(read_file(file, input_))


def test_damage_by_a_change_is_called_a_change(server: FileServer, name: str) -> None:
    reader = read_file(*only_file(f"{server.url}/{name}"))
    next(reader)
    (server.folder / name).write_bytes(bytes(size_of(server, name)))
    with pytest.raises(ValueError, match="changed while it was read"):
        list(reader)


def test_a_url_without_a_file(server: FileServer) -> None:
    with pytest.raises(ValueError, match=r"absent\.jsonl failed: there is no such file"):
        list(read_documents(corpus_of([f"{server.url}/absent.jsonl"])))


def test_the_signature_of_a_url_is_used_but_not_shown(server: FileServer, name: str) -> None:
    url = f"{server.url}/{name}"
    file, input_ = only_file(f"{url}?signature=secret")
    assert file.path == f"{url}?signature=secret"
    document = next(read_file(file, input_))
    assert (document.source, document.text) == (url, TEXTS[0])
    (server.folder / name).write_bytes(b"other")
    with pytest.raises(ValueError, match="changed") as error:
        next(read_file(file, input_))
    assert "secret" not in str(error.value)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3fs.S3FileSystem]:
    """A real S3 server with an empty bucket `corpora`."""
    point_at_s3(monkeypatch, endpoint)
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    fs.mkdir("corpora")
    yield fs
    fs.rm("corpora", recursive=True)


def test_objects_of_a_bucket(bucket: s3fs.S3FileSystem) -> None:
    contents = {
        "web/part-0.jsonl.gz": gzip.compress(as_lines(TEXTS[:100])),
        "web/part-1.jsonl.gz": gzip.compress(as_lines(TEXTS[100:200])),
        "web/deep/part-2.parquet": parquet_of(TEXTS[200:]),
        "web/.done": b"hidden",
        "webs/other.txt": b"of another folder",
    }
    for key, content in contents.items():
        bucket.pipe_file(f"corpora/{key}", content)
    (web,) = corpus_of(["s3://corpora/web"]).inputs
    files = list_files(web)
    names = ["web/deep/part-2.parquet", "web/part-0.jsonl.gz", "web/part-1.jsonl.gz"]
    assert [(file.path, file.size) for file in files] == [(f"s3://corpora/{n}", len(contents[n])) for n in names]
    documents = list(read_documents(corpus_of(["s3://corpora/web/*.gz", "s3://corpora/web/deep/"])))
    assert [document.text for document in documents] == TEXTS
    assert documents[0].source == "s3://corpora/web/part-0.jsonl.gz"
    bucket.pipe_file("corpora/web/part-0.jsonl.gz", contents["web/part-1.jsonl.gz"])
    with pytest.raises(ValueError, match=r"s3://corpora/web/part-0\.jsonl\.gz changed after it was listed"):
        list(read_file(files[1], web))


def test_a_listing_is_one_request_and_no_look_at_each_object(
    bucket: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        bucket.pipe_file(f"corpora/many/{number % 7}/{number}.txt", b"text")
    sent: list[str] = []
    session_send = aiobotocore.httpsession.AIOHTTPSession.send

    async def counted(self: Any, request: Any) -> Any:
        sent.append(f"{request.method} {request.url.partition('?')[2]}")
        return await session_send(self, request)

    monkeypatch.setattr(aiobotocore.httpsession.AIOHTTPSession, "send", counted)
    assert len(list_files(corpus_of(["s3://corpora/many"]).inputs[0])) == 30
    assert len(sent) == 1, sent


def test_an_object_or_a_bucket_that_is_not_there(bucket: s3fs.S3FileSystem) -> None:
    for path in ("s3://corpora/none", "s3://corpora/none/*.gz", "s3://nowhere/none"):
        with pytest.raises(ValueError, match=r"corpora/none does not exist|matches no file|no such file"):
            list(read_documents(corpus_of([path])))


def test_a_local_path_needs_no_url(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(as_lines(TEXTS))
    assert texts_of(f"file://{path}") == TEXTS
