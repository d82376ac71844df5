"""Files on this machine and in object stores through one door: fsspec, with time-outs, retries and checked lengths.

fsspec opens any path, but a body that ends early, a server that ignores Range and a status of 503 reach its caller in
many guises, some of them silent. Here a read gives exactly the bytes that were asked for, or one clear error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from data_pipeline.retries import READ_SECONDS, MissingFileError, retried, status_of

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

CONNECT_SECONDS = 10

LOCAL_PROTOCOLS = ("file", "local")
DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "http": "aiohttp", "https": "aiohttp", "gs": "gcsfs", "gcs": "gcsfs"}


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
    if protocol not in DRIVERS and not is_local(path):
        raise ValueError(f"cannot open {shown(path)}: {protocol}:// is not known; use a path or an s3, gs or https URL")
    try:
        file_system, root = fsspec.core.url_to_fs(path, **_options(protocol))
    except ImportError as error:
        driver = DRIVERS.get(protocol, f"a driver for {protocol}://")
        extra = "gcs" if driver == "gcsfs" else "data"
        raise ValueError(f"reading {shown(path)} needs {driver}: pip install 'steppe[{extra}]'") from error
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
        if is_http(file_system):
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
            if is_http(file_system):
                content: bytes = _run(_http_range, file_system, path, start, end)
            else:
                content = file_system.cat_file(path, start=start, end=end)
            got = len(content)
        except Exception as error:
            if status_of(error) != 416:  # range not satisfiable: it begins after the end
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


def is_http(file_system: "AbstractFileSystem") -> bool:
    """Whether it is one of plain HTTP, which has files but no listings."""
    return isinstance(file_system.protocol, tuple) and "http" in file_system.protocol


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
