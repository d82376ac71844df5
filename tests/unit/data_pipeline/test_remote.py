import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline import remote, retries
from data_pipeline.remote import (
    Identity,
    NoRangeError,
    download,
    identity,
    is_local,
    open_path,
    read_range,
    read_whole,
    shown,
)
from data_pipeline.retries import MissingFileError, RemoteError
from tests.unit.data_pipeline.servers import Fault, FileServer, file_server, point_at_s3, s3_server

CONTENT = os.urandom(100_000)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(retries, "ATTEMPTS", 4)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    (tmp_path / "a file.bin").write_bytes(CONTENT)
    (tmp_path / "empty").touch()
    with file_server(tmp_path) as server:
        yield server


def get(server: FileServer, start: int = 0, end: int = len(CONTENT)) -> bytes:
    return read_range(*open_path(f"{server.url}/a file.bin"), start, end)


@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 100_000), (99_999, 100_000), (5, 5), (10, 60_000)])
def test_a_range_is_all_of_it(server: FileServer, start: int, end: int) -> None:
    assert get(server, start, end) == CONTENT[start:end]
    file_system, path = open_path(server.folder / "a file.bin")
    assert read_range(file_system, path, start, end) == CONTENT[start:end]


@pytest.mark.parametrize("fault", ["503", "429", "reset", "truncated", "short"])
def test_what_passes_is_tried_again(server: FileServer, fault: Fault) -> None:
    server.faults.extend([fault] * 3)
    assert get(server, 10, 60_000) == CONTENT[10:60_000]
    server.faults.extend([fault] * (3 if fault != "short" else 0))
    assert read_whole(*open_path(f"{server.url}/a file.bin")) == CONTENT


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("503", "HTTP status 503"),
        ("reset", "Connection reset|Server disconnected"),
        ("truncated", "Response payload is not completed"),
        ("short", "50,000 bytes came instead of 100,000"),
    ],
)
def test_what_stays_is_one_clear_error(server: FileServer, fault: Fault, cause: str) -> None:
    server.always = fault
    began = r"^reading bytes 0 to 100,000 of http://127.0.0.1:\d+/a file.bin failed 4 times in \d s, at last by: .*"
    with pytest.raises(RemoteError, match=began + f"({cause})"):
        get(server)
    assert len(server.gets()) == 4 or fault == "reset"  # where aiohttp itself tries a kept connection once more


def test_a_server_that_does_not_answer(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (remote, retries):
        monkeypatch.setattr(module, "READ_SECONDS", 0.1)
    monkeypatch.setattr(retries, "ATTEMPTS", 2)
    server.faults.extend(["stalled"])
    assert get(server, 0, 10) == CONTENT[:10]
    server.faults.extend(["stalled"] * 2)
    began = time.monotonic()
    with pytest.raises(RemoteError, match=r"failed 2 times in \d s, at last by: no answer in 0.1 s"):
        get(server, 0, 10)
    assert time.monotonic() - began < 2


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with file_server(tmp_path) as server:
        pass
    with pytest.raises(RemoteError, match=r"failed 4 times .* Cannot connect to host 127.0.0.1"):
        get(server)
    with pytest.raises(RemoteError, match=r"looking at http://.* failed 4 times .* Cannot connect"):
        identity(*open_path(f"{server.url}/a"))


def test_what_will_not_change_is_not_tried_again(server: FileServer) -> None:
    with pytest.raises(MissingFileError, match=r"of http://[\d.:]+/b.bin failed: there is no such file$"):
        read_range(*open_path(f"{server.url}/b.bin"), 0, 1)
    with pytest.raises(MissingFileError, match=r"looking at http://[\d.:]+/b.bin failed: there is no such file$"):
        identity(*open_path(f"{server.url}/b.bin"))
    server.faults.append("403")
    with pytest.raises(ValueError, match=r"a file.bin failed: access is refused; check the permissions"):
        get(server)
    assert len(server.gets()) == 3


@pytest.mark.parametrize(("start", "end"), [(0, 100_001), (99_999, 200_000), (100_000, 100_001), (300_000, 300_001)])
def test_past_the_end(server: FileServer, start: int, end: int) -> None:
    """Asking again would help as little: the file is not what it should be."""
    with pytest.raises(ValueError, match=rf"a file.bin has 100,000 bytes, but byte {end - 1:,} was asked for$"):
        get(server, start, end)
    assert len(server.gets()) == 1
    with pytest.raises(ValueError, match=rf"^{server.folder}/a file.bin has 100,000 bytes, but byte {end - 1:,}"):
        read_range(*open_path(server.folder / "a file.bin"), start, end)


def test_a_server_without_ranges(server: FileServer, tmp_path: Path) -> None:
    server.ranges = False
    with pytest.raises(NoRangeError, match=r"a file.bin cannot be read in parts: its server ignores Range"):
        get(server, 5, 10)
    assert len(server.gets()) == 1
    server.faults.extend(["truncated", "503"])
    download(*open_path(f"{server.url}/a file.bin"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT


def test_identity(server: FileServer) -> None:
    server.etags["/a file.bin"] = '"one"'
    file_system, path = open_path(f"{server.url}/a file.bin")
    assert identity(file_system, path) == Identity(100_000, '"one"')
    server.etags["/a file.bin"] = '"two"'
    assert identity(file_system, path) == Identity(100_000, '"two"')
    server.head = False
    assert identity(file_system, path) == Identity(100_000, '"two"')
    assert identity(*open_path(f"{server.url}/empty")).size == 0
    server.ranges = False
    assert identity(file_system, path) == Identity(100_000, '"two"')
    server.sizes = False
    assert identity(file_system, path) == Identity(None, '"two"')
    server.head = True
    assert identity(file_system, path) == Identity(None, '"two"')


def test_identity_of_local_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    first = identity(*open_path(path))
    assert first.size == 3
    os.utime(path, ns=(1, 10**18))
    second = identity(*open_path(f"file://{path}"))
    assert second.size == 3
    assert second.tag != first.tag
    with pytest.raises(MissingFileError, match=f"looking at {tmp_path}/b failed: there is no such file"):
        identity(*open_path(tmp_path / "b"))
    with pytest.raises(MissingFileError, match=f"{tmp_path} is a folder, but a file was expected"):
        identity(*open_path(tmp_path))


def test_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_local("/a/b")
    assert is_local("a/b")
    assert is_local("file:///a")
    assert not is_local("s3://a/b")
    assert not is_local("https://a/b")
    assert open_path("relative")[1] == str(Path("relative").absolute())
    assert shown("https://me:secret@host:80/a/b?signature=1#c") == "https://host:80/a/b"
    assert shown("/a?b") == "/a?b"
    with pytest.raises(ValueError, match="nothing:// is not known; use a path or an s3, gs or https URL"):
        open_path("nothing://a")


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [("gs://a/b", "gcsfs", "gcs"), ("s3://a/b", "s3fs", "data"), ("https://a/b", "aiohttp", "data")],
)
def test_a_driver_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, url: str, package: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url.partition(":")[0], raising=False)
    with pytest.raises(ValueError, match=rf"^reading {url} needs {package}: pip install 'steppe\[{extra}\]'$"):
        open_path(url)


def test_no_error_shows_a_signature(server: FileServer) -> None:
    faults: list[Fault] = ["404", "403", "503", "truncated"]
    for fault in faults:
        server.always = fault
        with pytest.raises((ValueError, OSError)) as raised:
            read_range(*open_path(f"{server.url.replace('//', '//me:pass@')}/a file.bin?signature=secret"), 0, 10)
        assert "secret" not in str(raised.value)
        assert "pass" not in str(raised.value)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.mark.slow
def test_s3(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    point_at_s3(monkeypatch, s3)
    file_system, path = open_path("s3://remote-test/folder/a.bin")
    file_system.mkdir("remote-test")
    file_system.pipe_file(path, CONTENT)
    assert read_range(file_system, path, 10, 60_000) == CONTENT[10:60_000]
    assert read_whole(file_system, path) == CONTENT
    first = identity(file_system, path)
    assert first.size == 100_000
    with pytest.raises(ValueError, match=r"^s3://remote-test/folder/a.bin has 100,000 bytes, but byte 100,000 was"):
        read_range(file_system, path, 90_000, 100_001)
    with pytest.raises(ValueError, match="has 100,000 bytes, but byte 200,000 was asked for"):
        read_range(file_system, path, 200_000, 200_001)
    with pytest.raises(MissingFileError, match=r"of s3://remote-test/folder/b failed: there is no such file"):
        read_range(file_system, "remote-test/folder/b", 0, 1)
    with pytest.raises(MissingFileError, match="looking at s3://no-bucket/b failed: there is no such file"):
        identity(file_system, "no-bucket/b")
    with pytest.raises(MissingFileError, match="s3://remote-test/folder is a folder"):
        identity(file_system, "remote-test/folder")
    file_system.pipe_file(path, CONTENT[::-1])
    assert identity(file_system, path).tag != first.tag
    download(file_system, path, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize(("fault", "times"), [("503", 4), ("reset", 4), ("truncated", 4), ("404", 1), ("403", 1)])
def test_faults_of_an_s3_server(server: FileServer, monkeypatch: pytest.MonkeyPatch, fault: Fault, times: int) -> None:
    """The HTTP server answers a GET as an S3 server would, and fails as well."""
    point_at_s3(monkeypatch, server.url)
    (server.folder / "bucket").mkdir()
    (server.folder / "bucket" / "a.bin").write_bytes(CONTENT)
    file_system, path = open_path("s3://bucket/a.bin")
    server.faults.extend([fault] * (times - 1))
    assert read_range(file_system, path, 10, 20) == CONTENT[10:20]
    assert len(server.gets()) == times
    server.always = fault
    with pytest.raises(RemoteError if times > 1 else ValueError, match="s3://bucket/a.bin"):
        read_range(file_system, path, 10, 20)
    # aiohttp itself tries a connection that breaks once more; beyond that, attempts are ours.
    assert 2 * times <= len(server.gets()) <= 2 * times * (2 if fault == "reset" else 1)


def test_s3_without_credentials(server: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    point_at_s3(monkeypatch, server.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ValueError, match="reading s3://bucket/a failed: .*credentials"):
        read_whole(*open_path("s3://bucket/a"))
