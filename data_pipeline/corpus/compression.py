"""Archives of one file: opened by the suffix of a name, and said to be damaged where they are."""

import bz2
import gzip
import io
import lzma
import zlib
from typing import Any, BinaryIO

from data_pipeline.corpus.formats import split_compression
from data_pipeline.retries import RemoteError

READ_BYTES = 1 << 20


def decompressed(stored: io.BufferedReader, file: str) -> BinaryIO:
    """The content of an open file, decompressed by the suffix of its name `file`; all members of one that has several.

    Reading it raises ValueError where an archive is truncated or damaged.
    """
    compression = split_compression(file)[1]
    if not compression:
        return stored
    decompressor: Any
    if compression == ".gz":
        decompressor = gzip.GzipFile(fileobj=stored)
    elif compression == ".bz2":
        decompressor = bz2.BZ2File(stored)
    elif compression == ".xz":
        decompressor = lzma.LZMAFile(stored)  # noqa: SIM115
    else:
        # arrow is here with `datasets` and brings zstd, which Python's own library does not before 3.14.
        import pyarrow

        decompressor = pyarrow.CompressedInputStream(stored, "zstd")
    return io.BufferedReader(_GuardedReader(decompressor, file), buffer_size=READ_BYTES)


def is_failure_of_store(error: Exception) -> bool:
    """Whether bytes did not come, rather than that they are bad.

    Decompressors and arrow use OSError for bad content, too, but then without the errno of a failing disk.
    """
    return isinstance(error, RemoteError) or (isinstance(error, OSError) and error.errno is not None)


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
            if is_failure_of_store(error):
                raise
            raise ValueError(f"input {self._file} is truncated or damaged ({error}): fetch it again") from error
        buffer[: len(content)] = content
        return len(content)
