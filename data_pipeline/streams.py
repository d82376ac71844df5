"""Byte streams out of files, compressed or not, that count what they read and say so when an archive is damaged."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

COMPRESSION_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
READ_BYTES = 1 << 20

OnBytes = Callable[[int], None]


def split_compression(file: str) -> tuple[str, str]:
    """The file's name without the suffix of a compression, and that suffix or nothing."""
    for suffix in COMPRESSION_SUFFIXES:
        if file.endswith(suffix):
            return file.removesuffix(suffix), suffix
    return file, ""


def open_stream(raw: BinaryIO, file: str, on_bytes: OnBytes) -> BinaryIO:
    """The content of an open file, decompressed by the name's suffix; `on_bytes` is told of raw bytes as they are read.

    Reading it raises ValueError where an archive is truncated or damaged.
    """
    buffered = io.BufferedReader(_CountedReader(raw, on_bytes), buffer_size=READ_BYTES)
    compression = split_compression(file)[1]
    if not compression:
        return buffered
    decompressor: Any
    if compression == ".gz":
        decompressor = gzip.GzipFile(fileobj=buffered)
    elif compression == ".bz2":
        decompressor = bz2.BZ2File(buffered)
    elif compression == ".xz":
        decompressor = lzma.LZMAFile(buffered)  # noqa: SIM115
    else:
        # arrow is here with `datasets` and brings zstd, which Python's own library does not before 3.14.
        import pyarrow

        decompressor = pyarrow.CompressedInputStream(buffered, "zstd")
    return io.BufferedReader(_GuardedReader(decompressor, file), buffer_size=READ_BYTES)


class _CountedReader(io.RawIOBase):
    """Passes a raw stream through and tells how many bytes were taken from it."""

    def __init__(self, raw: BinaryIO, on_bytes: OnBytes) -> None:
        self._raw = raw
        self._on_bytes = on_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._raw.read(len(buffer))
        buffer[: len(content)] = content
        self._on_bytes(len(content))
        return len(content)


class _GuardedReader(io.RawIOBase):
    """Passes a decompressor through and turns its complaints about the content into ours."""

    def __init__(self, decompressor: Any, file: str) -> None:
        self._decompressor = decompressor
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._decompressor.read(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            # Decompressors use OSError for bad content too, but then without the errno of a failing disk.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"input {self._file} is truncated or damaged ({error}): fetch it again") from error
        buffer[: len(content)] = content
        return len(content)
