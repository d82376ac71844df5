"""Sketches of many documents in one file, laid out for what duplicates are found by.

After a header come blocks of BLOCK_DOCUMENTS documents (the last holds fewer), and in each the columns: the hashes
(n, 2) uint64, the keys of each band (bands, n) uint64, the signatures (n, permutations) uint32; all little-endian.
So a band is read without the rest, and a signature is found by its document's number.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from data_pipeline.curation.sketch import HASH_BYTES, Bands, Sketch
from data_pipeline.shards import AtomicFile

MAGIC = b"SKETCH01"
HEADER = struct.Struct("<8sQQQ")
"""Magic, permutations, bands, rows of a band."""
BLOCK_DOCUMENTS = 1 << 14
HASH_COLUMN = -1
"""The number that stands for the hashes where columns of keys are numbered by their band."""


class SketchWriter:
    """Writes the sketches of a unit's documents, in order; the file has its name once it is complete.

    Leaving the context by an exception discards it.
    """

    def __init__(self, path: Path, permutations: int, bands: Bands) -> None:
        self.documents = 0
        self._pending = 0
        self._bands = bands
        self._hashes = np.empty((BLOCK_DOCUMENTS, 2), "<u8")
        self._signatures = np.empty((BLOCK_DOCUMENTS, permutations), "<u4")
        self._file = AtomicFile(path)
        self._file.write(HEADER.pack(MAGIC, permutations, bands.count, bands.rows))

    def __enter__(self) -> "SketchWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
            self._file.commit()
        else:
            self._file.discard()

    def append(self, sketch: Sketch) -> None:
        self._hashes[self._pending] = np.frombuffer(sketch.hash, "<u8")
        self._signatures[self._pending] = sketch.signature
        self.documents += 1
        self._pending += 1
        if self._pending == BLOCK_DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        signatures = self._signatures[: self._pending]
        for column in (self._hashes[: self._pending], self._bands.keys(signatures), signatures):
            self._file.write(column.tobytes())
        self._pending = 0


class SketchFile:
    """Reads what a SketchWriter wrote. Opening reads the header only.

    Raises:
        ValueError: the file is none of these, or torn.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
            size = os.fstat(file.fileno()).st_size
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise ValueError(f"{path} is no file of sketches: remove the folder of the unfinished job and start again")
        _, self.permutations, bands, rows = HEADER.unpack(header)
        self.bands = Bands(bands, rows)
        self._document_bytes = HASH_BYTES + 8 * bands + 4 * self.permutations
        self.documents, torn = divmod(size - HEADER.size, self._document_bytes)
        if torn:
            raise ValueError(f"{path} is torn: remove the folder of the unfinished job and start again")
        self._map: mmap.mmap | None = None

    def keys(self, column: int) -> Iterator[np.ndarray]:
        """A band's keys, or the first halves of the hashes (HASH_COLUMN), (n,) uint64 of one block after another."""
        with open(self.path, "rb", buffering=0) as file:
            for start in range(0, self.documents, BLOCK_DOCUMENTS):
                count = min(BLOCK_DOCUMENTS, self.documents - start)
                offset = HEADER.size + start * self._document_bytes
                if column == HASH_COLUMN:
                    hashes = np.frombuffer(os.pread(file.fileno(), HASH_BYTES * count, offset), "<u8")
                    yield hashes[::2]
                else:
                    offset += (HASH_BYTES + 8 * column) * count
                    yield np.frombuffer(os.pread(file.fileno(), 8 * count, offset), "<u8")

    def hashes(self, documents: np.ndarray) -> np.ndarray:
        """Of the documents of these numbers (n,): (n, 2) uint64."""
        return self._rows(documents, np.dtype("<u8"), 2, 0)

    def signatures(self, documents: np.ndarray) -> np.ndarray:
        """Of the documents of these numbers (n,): (n, permutations) uint32."""
        return self._rows(documents, np.dtype("<u4"), self.permutations, HASH_BYTES + 8 * self.bands.count)

    def _rows(self, documents: np.ndarray, dtype: np.dtype, width: int, column_bytes: int) -> np.ndarray:
        """Rows of a column that begins so many bytes a document into its block."""
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        rows = np.empty((len(documents), width), dtype)
        blocks = documents // BLOCK_DOCUMENTS
        for block in np.unique(blocks):
            start = int(block) * BLOCK_DOCUMENTS
            count = min(BLOCK_DOCUMENTS, self.documents - start)
            offset = HEADER.size + start * self._document_bytes + column_bytes * count
            column = np.frombuffer(self._map, dtype, count * width, offset).reshape(count, width)
            inside = blocks == block
            rows[inside] = column[documents[inside] - start]
        return rows
