"""Files on this machine and in object stores through one door: fsspec, with time-outs, retries and checked lengths.

fsspec opens any path, but a body that ends early, a server that ignores Range and a status of 503 reach its caller in
many guises, some of them silent. Here a read gives exactly the bytes that were asked for, or one clear error.
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

CONNECT_SECONDS = 10
READ_SECONDS = 30
"""For the next bytes to come, not for a whole body."""
ATTEMPTS = 8
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
"""Waits double from the first up to this: 8 attempts wait for 60 s in all, which most outages of a store end within."""

LOCAL_PROTOCOLS = ("file", "local")
DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "http": "aiohttp", "https": "aiohttp", "gs": "gcsfs", "gcs": "gcsfs"}
NETWORK_LIBRARIES = ("aiohttp", "aiobotocore", "botocore", "urllib3", "requests", "gcsfs", "http")
"""Errors of these are failures of the network, unless they carry a status that says otherwise."""
PASSING_STATUSES = (408, 409, 425, 429)
"""Client errors that a retry may mend: time-out, conflict, too early, too many requests. Those from 500 on do, too."""

Result = TypeVar("Result")


class RemoteError(OSError):
    """A file could not be read although it was tried again and again; a later run may succeed."""


class MissingFileError(ValueError):
    """A path names nothing."""


class NoRangeError(ValueError):
    """The server sends whole files only."""


@dataclass(frozen=True)
class Identity:
    """What tells two states of a file apart."""

    size: int | None
    """In bytes; None where the server does not say."""
    tag: str | None
    """ETag, else the time of the last change."""


def is_local(path: str) -> bool:
    """Whether a path lies in a file system of this machine rather than behind a URL."""
    protocol, separator, _ = str(path).partition("://")
    return not separator or protocol in LOCAL_PROTOCOLS


def open_path(path: str | Path) -> "tuple[AbstractFileSystem, str]":
    """The file system of a path and the path within it.

    Raises:
        ValueError: the protocol is unknown, or the package that speaks it is not installed.
    """
    import fsspec  # takes a while, which `steppe --help` need not wait for

    path = str(path)
    protocol = path.partition("://")[0] if "://" in path else "file"
    try:
        file_system, root = fsspec.core.url_to_fs(path, **_options(protocol))
    except ImportError as error:
        driver = DRIVERS.get(protocol, f"a driver for {protocol}://")
        raise ValueError(f"reading {shown(path)} needs {driver}: pip install 'steppe[data]'") from error
    except ValueError as error:
        raise ValueError(f"cannot open {shown(path)} ({error}): use a path or an s3, gs, http or https URL") from error
    if protocol in ("s3", "s3a"):
        file_system.retries = 1  # else each of our attempts would be five of its own
    return file_system, str(root)


def _options(protocol: str) -> dict[str, Any]:
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        # Ranges are of the stored bytes; a body that is compressed on the way has others.
        headers = {"Accept-Encoding": "identity"}
        return {"client_kwargs": {"timeout": timeout, "headers": headers, "trust_env": True}}
    if protocol in ("s3", "s3a"):
        config = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS, "retries": {"max_attempts": 0}}
        return {"config_kwargs": config, "use_listings_cache": False}
    return {}


def shown(path: str) -> str:
    """A path as errors and logs may show it: without the user, the password and the signature of a URL."""
    if is_local(path):
        return path
    parts = urlsplit(path)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def identity(file_system: "AbstractFileSystem", path: str) -> Identity:
    """Size and tag of a file, asked of the store itself.

    Raises:
        ValueError: there is no such file (`MissingFileError`), or access to it is refused.
        RemoteError: the store cannot be reached.
    """
    name = _full(file_system, path)

    def look() -> Identity:
        if _is_http(file_system):
            found: Identity = _run(_http_identity, file_system, path)
            return found
        info = file_system.info(path)
        if info["type"] == "directory":
            raise MissingFileError(f"{name} is a folder, but a file was expected")
        return identity_in(info)

    return retried(f"looking at {name}", look)


def identity_in(info: Mapping[str, Any]) -> Identity:
    """Size and tag of a file in what fsspec says of it, by `info` or in a listing."""
    tag = next((info[key] for key in ("ETag", "etag", "LastModified", "mtime") if info.get(key)), None)
    return Identity(info["size"], None if tag is None else str(tag))


def read_range(file_system: "AbstractFileSystem", path: str, start: int, end: int) -> bytes:
    """Bytes `[start, end)` of a file: all of them.

    Raises:
        ValueError: there is no such file, it ends before `end`, access to it is refused, or the server sends whole
            files only (`NoRangeError`).
        RemoteError: they did not come in full.
    """
    assert 0 <= start <= end
    if start == end:
        return b""

    name = _full(file_system, path)

    def read() -> bytes:
        try:
            if _is_http(file_system):
                content: bytes = _run(_http_range, file_system, path, start, end)
            else:
                content = file_system.cat_file(path, start=start, end=end)
            got = len(content)
        except Exception as error:
            if _status(error) != 416:  # range not satisfiable: it begins after the end
                raise
            got = 0
        if got == end - start:
            return content
        # Whether the file is too short or the connection broke is asked only once something is wrong.
        size = identity(file_system, path).size
        if size is not None and size < end:
            raise ValueError(f"{name} has {size:,} bytes, but byte {end - 1:,} was asked for")
        raise OSError(f"{got:,} bytes came instead of {end - start:,}")

    return retried(f"reading bytes {start:,} to {end:,} of {name}", read)


def read_whole(file_system: "AbstractFileSystem", path: str) -> bytes:
    """All bytes of a (small) file.

    Raises:
        ValueError: there is no such file, or access to it is refused.
        RemoteError: it did not come in full.
    """
    return retried(f"reading {_full(file_system, path)}", lambda: file_system.cat_file(path))


def download(file_system: "AbstractFileSystem", path: str, target: Path) -> None:
    """Copy a whole file of any size here, for what can only be read so. A failed copy begins anew.

    Raises:
        ValueError: there is no such file, or access to it is refused.
        RemoteError: it did not come in full.
    """
    retried(f"copying {_full(file_system, path)}", lambda: file_system.get_file(path, str(target)))


def retried(what: str, call: Callable[[], Result]) -> Result:
    """Call until it succeeds, with exponentially growing and jittered waits between the attempts.

    Args:
        what: what the call does, as an error says it: "reading s3://bucket/name".
        call: what is done; it may raise anything. Time-outs, connections that break, short bodies and statuses from
            500 on are tried again, statuses that say that asking again is useless are not, nor is what is no failure
            of a network or a disk.

    Raises:
        ValueError: there is no such file (`MissingFileError`), or access to it is refused.
        RemoteError: the last attempt failed, too.
    """
    began = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            if permanent := _permanent(error):
                raise permanent(f"{what} failed: {_cause(error)}") from error
            if not _may_pass(error):
                raise
            if attempt == ATTEMPTS:
                seconds = time.monotonic() - began
                raise RemoteError(
                    f"{what} failed {ATTEMPTS} times in {seconds:.0f} s, at last by: {_cause(error)}"
                ) from error
        wait = min(FIRST_WAIT_SECONDS * 2 ** (attempt - 1), LONGEST_WAIT_SECONDS)
        time.sleep(random.uniform(wait / 2, wait))  # so that the ranks of a cluster do not all come back at once
    raise AssertionError("unreachable: the last attempt returns or raises")


def _permanent(error: BaseException) -> type[ValueError] | None:
    """The error to raise at once, where another attempt would end the same way."""
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return MissingFileError
    if isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError):
        return ValueError
    if "Credentials" in type(error).__name__:  # botocore's NoCredentialsError and its kin
        return ValueError
    if status is not None and 400 <= status < 500 and status not in PASSING_STATUSES:
        return ValueError
    return None


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, OSError):  # TimeoutError and ConnectionError among them
        return not isinstance(error, RemoteError)  # which has been retried already
    return any(base.__module__.partition(".")[0] in NETWORK_LIBRARIES for base in type(error).__mro__)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error stands for: aiohttp's, gcsfs's, or botocore's below s3fs's translation."""
    for name in ("status", "code"):
        if isinstance(status := getattr(error, name, None), int) and 100 <= status < 600:
            return status
    response = getattr(error, "response", getattr(error.__cause__, "response", None))
    if isinstance(response, dict):
        found: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found
    return None


def _cause(error: BaseException) -> str:
    """One line. aiohttp's own words for a status would show the URL with its signature."""
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "there is no such file"
    if isinstance(error, PermissionError) or status in (401, 403):
        return "access is refused; check the permissions and the credentials"
    if status is not None:
        return f"HTTP status {status}"
    if isinstance(error, TimeoutError):
        return f"no answer in {READ_SECONDS} s"
    return " ".join(str(error).split()) or type(error).__name__


def _is_http(file_system: "AbstractFileSystem") -> bool:
    return "http" in file_system.protocol and isinstance(file_system.protocol, tuple)


def _full(file_system: "AbstractFileSystem", path: str) -> str:
    """A path within a file system, as errors show it."""
    url = str(file_system.unstrip_protocol(path))
    return path if is_local(url) else shown(url)


def _run(coroutine: Callable[..., Any], file_system: "AbstractFileSystem", *arguments: Any) -> Any:
    """Run a coroutine in fsspec's thread and wait for it."""
    from fsspec.asyn import sync

    return sync(file_system.loop, coroutine, file_system, *arguments)


async def _http_identity(file_system: Any, url: str) -> Identity:
    """By HEAD, or by asking for the first byte where a server does not know (or a signature does not allow) HEAD.

    fsspec's own way would call a server that is down for a moment a file that is not there.
    """
    session = await file_system.set_session()
    async with session.head(file_system.encode_url(url), allow_redirects=True) as response:
        if response.ok and "Content-Length" in response.headers:
            return _identity_of(response.headers, int(response.headers["Content-Length"]))
    async with session.get(file_system.encode_url(url), headers={"Range": "bytes=0-0"}) as response:
        if response.status == 416:  # no first byte
            return _identity_of(response.headers, 0)
        response.raise_for_status()
        if response.status == 206:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            return _identity_of(response.headers, int(total) if total.isdecimal() else None)
        return _identity_of(response.headers, response.content_length)


def _identity_of(headers: Any, size: int | None) -> Identity:
    return Identity(size, headers.get("ETag") or headers.get("Last-Modified"))


async def _http_range(file_system: Any, url: str, start: int, end: int) -> bytes:
    session = await file_system.set_session()
    async with session.get(file_system.encode_url(url), headers={"Range": f"bytes={start}-{end - 1}"}) as response:
        response.raise_for_status()
        if response.status != 206:  # a status of 200 brings the whole file, however large
            raise NoRangeError(f"{shown(url)} cannot be read in parts: its server ignores Range requests; copy it here")
        content: bytes = await response.read()
        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise OSError(f"the server sent the range {response.headers.get('Content-Range')!r}")
        return content
