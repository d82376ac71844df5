"""One rank's file: safetensors, hashed block by block as it is written, verified block by block as it is read.

    8 bytes        length of the header
    header         JSON: {"fp32/norm.weight@0": {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}, ...}
    values         fp32, in the header's order: what is cut into blocks
    "xxh3/blocks"  U8 (n, 8): xxh3-64 of each block, a tensor like the others to any reader

The hash of the header and of this last tensor stands in the index, and so vouches for every byte. Reading is by
`preadv` into memory of our own: of a mapped file, the bytes that are hashed need not be those that are copied.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import xxhash
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import Tensor

from pretrain.boxes import Box, Index
from pretrain.checkpoint.index import DamagedError, StoredFile, check_size
from pretrain.safetensors_header import Entry, safetensors_header

BLOCK_BYTES = 256 << 10  # 8 bytes of hash each; small, so that a part can be verified without reading much else
READ_BYTES = 16 << 20  # at a time: long enough for a parallel file system, short enough for any memory
_WRITE_BYTES = 4 << 20
_HASHES = "xxh3/blocks"
_ITEM = 4  # bytes of an fp32


def tensor_key(kind: str, name: str, box: Box) -> str:
    """The name in the file of a kind of state of a parameter's box."""
    return f"{kind}/{name}@{','.join(map(str, box.offset))}"


def write_rank_file(path: Path, entries: Sequence[tuple[str, Index]], values: Iterable[Tensor]) -> StoredFile:
    """Write the file and fsync it.

    entries: key and shape of each tensor. values: fp32 tensors on the CPU whose elements one after the other are those
    of the entries; they may be cut anywhere else, and each is let go of before the next is asked for.
    Raises OSError naming the file.
    """
    total = _ITEM * sum(math.prod(shape) for _, shape in entries)
    header = _header(entries, total)
    hashes = bytearray()
    try:
        with open(path, "wb") as file:
            file.write(header)
            for chunk in _chunks(values, hashes):
                file.write(chunk)
            file.write(hashes)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error
    assert size == len(header) + total + len(hashes), f"{path}: the values are not those of the entries"
    return StoredFile(size_bytes=size, xxh3=_seal(header, hashes))


def _header(entries: Sequence[tuple[str, Index]], total: int) -> bytes:
    blocks = -(-total // BLOCK_BYTES)
    tensors = [Entry(key, "F32", shape, _ITEM * math.prod(shape)) for key, shape in entries]
    return safetensors_header([*tensors, Entry(_HASHES, "U8", (blocks, 8), 8 * blocks)])


def _chunks(values: Iterable[Tensor], hashes: bytearray) -> Iterator[memoryview]:
    """The values' bytes in pieces to write; the hash of each block is added to `hashes` when the block is full."""
    block, filled = xxhash.xxh3_64(), 0
    for tensor in values:
        assert tensor.dtype == torch.float32
        data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        for start in range(0, len(data), _WRITE_BYTES):
            chunk = data[start : start + _WRITE_BYTES]
            at = 0
            while at < len(chunk):
                taken = min(BLOCK_BYTES - filled, len(chunk) - at)
                block.update(chunk[at : at + taken])
                at, filled = at + taken, filled + taken
                if filled == BLOCK_BYTES:
                    hashes += block.digest()
                    block, filled = xxhash.xxh3_64(), 0
            yield chunk
    if filled:
        hashes += block.digest()


def _seal(header: bytes | bytearray, hashes: bytearray) -> str:
    seal = xxhash.xxh3_64(header)
    seal.update(hashes)
    return seal.hexdigest()


class _Stored(BaseModel):
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_HEADER = TypeAdapter(dict[str, _Stored])


class RankFile:
    """A rank's file, open to read."""

    def __init__(self, path: Path, stored: StoredFile, block_bytes: int) -> None:
        """Read and verify the header and the hashes. Raises DamagedError, or OSError where it cannot be read."""
        self.path, self.block_bytes = path, block_bytes
        check_size(path, stored.size_bytes)
        self._handle = os.open(path, os.O_RDONLY)
        try:
            length = int.from_bytes(self._pread(0, 8), "little")
            if length > stored.size_bytes - 8:
                raise DamagedError(f"{path} is damaged: its header is longer than the file")
            self._start = 8 + length
            # An n-block file has so many bytes of values; the rest of what follows the header are hashes.
            rest = stored.size_bytes - self._start
            blocks = -(-rest // (block_bytes + 8))
            self.value_bytes = rest - 8 * blocks
            header = self._pread(0, self._start)
            self._hashes = self._pread(self._start + self.value_bytes, 8 * blocks)
            if _seal(header, self._hashes) != stored.xxh3:
                raise DamagedError(f"{path} is damaged, or not of this checkpoint: its header does not match its hash")
            self.entries = self._parsed(header, path)
        except BaseException:
            os.close(self._handle)
            raise
        self._buffer = bytearray()
        self._kept, self._kept_block = bytearray(min(block_bytes, self.value_bytes)), -1

    def close(self) -> None:
        os.close(self._handle)

    def release(self) -> None:
        """Let go of the memory that `read` and `rows` hand out: hundreds of files may be open at a time."""
        self._buffer = bytearray()

    def start_of(self, key: str, size: Index) -> int:
        """Where a tensor begins among the values. Raises DamagedError unless it is there, in fp32, of this size."""
        entry = self.entries.get(key)
        if entry is None or entry.dtype != "F32" or entry.shape != size:
            raise DamagedError(f"{self.path} does not hold {key} of shape {list(size)}, as the index says")
        start, end = entry.data_offsets
        if not 0 <= start <= end <= self.value_bytes or end - start != _ITEM * math.prod(size):
            raise DamagedError(f"{self.path}: {key} lies outside of its values")
        return start

    def rows(self, key: str, size: Index, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """Rows [first, last) of a tensor, in verified parts: (number of a part's first row, its rows).

        A part is only good until the next is asked for.
        """
        row_bytes = _ITEM * math.prod(size[1:])
        start = self.start_of(key, size)
        step = max(1, READ_BYTES // row_bytes)
        for row in range(first, last, step):
            end = min(row + step, last)
            data = self.read(start + row * row_bytes, start + end * row_bytes)
            yield row, torch.frombuffer(data, dtype=torch.float32).view(end - row, *size[1:])

    def read(self, start: int, stop: int) -> memoryview:
        """Verified bytes [start, stop) of the values, good until the next call. Raises as `read_into` does."""
        if len(self._buffer) < stop - start:
            self._buffer = bytearray(stop - start)
        target = memoryview(self._buffer)[: stop - start]
        self.read_into(target, start)
        return target

    def read_into(self, target: memoryview, start: int) -> None:
        """Read the values' bytes from `start` on into `target`, and verify them there: whole blocks are not copied.

        Reading onwards, no block is read twice: one that ends within another tensor is kept.
        Raises DamagedError naming the tensor that a bad block lies in; some of `target` has been written to then.
        """
        size, at, stop = self.block_bytes, start, start + len(target)
        # As many blocks at a time as are read at once; the last of the file may be short.
        step = max(1, READ_BYTES // size) * size
        while at < stop:
            block = at // size
            end = stop if stop == self.value_bytes else stop - stop % size
            if at % size or end <= at:
                end = min(stop, (block + 1) * size)
                target[at - start : end - start] = self._block(block)[at - block * size : end - block * size]
            else:
                end = min(end, at + step)
                part = target[at - start : end - start]
                self._read_into(part, self._start + at)
                self._verify(part, block)
            at = end

    def _block(self, block: int) -> memoryview:
        """A verified block, kept until another is asked for."""
        begin = block * self.block_bytes
        kept = memoryview(self._kept)[: min(self.block_bytes, self.value_bytes - begin)]
        if block != self._kept_block:
            self._kept_block = -1
            self._read_into(kept, self._start + begin)
            self._verify(kept, block)
            self._kept_block = block
        return kept

    def _verify(self, data: memoryview, block: int) -> None:
        for at in range(0, len(data), self.block_bytes):
            found = xxhash.xxh3_64_digest(data[at : at + self.block_bytes])
            if found != self._hashes[8 * block : 8 * block + 8]:
                raise DamagedError(f"{self.path} is damaged: block {block} ({self._key_of(block)}) fails its hash")
            block += 1

    def _key_of(self, block: int) -> str:
        """The first tensor with a part in a block."""
        begin = block * self.block_bytes
        return next(key for key, entry in self.entries.items() if entry.data_offsets[1] > begin)

    @staticmethod
    def _parsed(header: bytes | bytearray, path: Path) -> dict[str, _Stored]:
        try:
            return _HEADER.validate_json(bytes(header[8:]))
        except ValidationError as error:
            raise DamagedError(f"{path} has no safetensors header: {error.errors()[0]['msg']}") from None

    def _pread(self, at: int, length: int) -> bytearray:
        data = bytearray(length)
        self._read_into(memoryview(data), at)
        return data

    def _read_into(self, buffer: memoryview, at: int) -> None:
        filled = 0
        while filled < len(buffer):
            count = os.preadv(self._handle, [buffer[filled:]], at + filled)
            if count == 0:
                raise DamagedError(f"{self.path} ends before its {at + len(buffer)} bytes")
            filled += count
