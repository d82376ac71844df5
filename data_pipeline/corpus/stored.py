"""The stored bytes of an input's file, local or remote, as one seekable stream of one and the same state of it."""

import io
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import fsspec

from data_pipeline.corpus.document import OnBytes
from data_pipeline.corpus.listing import InputFile
from data_pipeline.remote import NoRangeError, download, identity, is_local, open_path, read_range

PIECE_BYTES = 8 << 20
"""Of a remote file, fetched by one request; three of them are held at most."""
BUFFER_BYTES = 1 << 17


@contextmanager
def opened(file: InputFile, on_bytes: OnBytes) -> Iterator[io.BufferedReader]:
    """Open a listed file; `on_bytes` is told of stored bytes as they are read, of `file.size` in all by the end.

    A remote file is read in pieces, one ahead; from a server that does not send pieces it is first copied to a
    temporary file.

    Raises:
        ValueError: the file is gone, or has changed since it was listed or while it was read.
        OSError: its store did not answer in spite of retries.
    """
    fs, path = open_path(file.path)

    def check(when: str) -> None:
        now = identity(fs, path)
        if (now.size, now.tag) != (file.size, file.tag):
            raise ValueError(f"input {file.label} changed {when}: start again with the file as it is now")

    check("after it was listed")
    with ExitStack() as stack:
        raw = _local(path) if is_local(file.path) else _remote(fs, path, file.size, stack)
        counted = _CountedReader(stack.enter_context(raw), on_bytes, file.size)
        try:
            yield io.BufferedReader(counted, BUFFER_BYTES)
        except ValueError:
            check("while it was read")  # which explains the damage that was found
            raise
    check("while it was read")
    counted.finish()


def _local(path: str) -> io.RawIOBase:
    return open(path, "rb", buffering=0)


def _remote(fs: fsspec.AbstractFileSystem, path: str, size: int | None, stack: ExitStack) -> io.RawIOBase:
    if size is not None:
        try:
            return _PieceReader(fs, path, size)
        except NoRangeError:
            pass
    copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steppe-input-"))) / "copy"
    download(fs, path, copy)
    return _local(str(copy))


class _PieceReader(io.RawIOBase):
    """A remote file, piece by piece; while one is read the next is fetched, unless the reader jumps about."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, size: int) -> None:
        self._fs = fs
        self._path = path
        self._size = size
        self._position = 0
        self._start = 0
        self._piece = b""
        self._ahead: tuple[int, Future[bytes]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        try:
            self._load(0)
        except BaseException:
            self.close()
            raise

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        if not self._start <= self._position < self._start + len(self._piece):
            self._load(self._position)
        offset = self._position - self._start
        content = memoryview(self._piece)[offset : offset + len(buffer)]
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._pool.shutdown(wait=True, cancel_futures=True)
        super().close()

    def _load(self, start: int) -> None:
        goes_on = start == self._start + len(self._piece)
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == start:
            self._piece = ahead[1].result()
        else:
            self._piece = self._fetch(start)
        self._start = start
        end = start + len(self._piece)
        if goes_on and end < self._size:
            self._ahead = (end, self._pool.submit(self._fetch, end))

    def _fetch(self, start: int) -> bytes:
        return read_range(self._fs, self._path, start, min(start + PIECE_BYTES, self._size))


class _CountedReader(io.RawIOBase):
    """Passes a reader through and tells how many bytes were taken from it: never more than it has, in the end all."""

    def __init__(self, raw: io.RawIOBase, on_bytes: OnBytes, size: int | None) -> None:
        self._raw = raw
        self._on_bytes = on_bytes
        self._left = size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._raw.seekable()

    def tell(self) -> int:
        return self._raw.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._raw.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer)
        assert count is not None
        self._tell_of(count)
        return count

    def finish(self) -> None:
        """Tell of what nobody needed to read, such as the columns of a table that were not asked for."""
        if self._left is not None:
            self._tell_of(self._left)

    def _tell_of(self, count: int) -> None:
        if self._left is not None:
            count = min(count, self._left)
            self._left -= count
        if count:
            self._on_bytes(count)
