"""Plans of bins on disk: made once for a finished data folder and a sequence length T, read by every run.

NAME.pack{T}     the samples of a shard, as `Extents` are, little-endian: where each sample's extents begin `(n + 1,)`
                 uint32; first token of each extent within the shard `(m,)` and its tokens `(m,)`, both uint32 or, in a
                 shard of more than 2^32 tokens, int64
pack{T}.blocks   samples and tokens of each shuffle block of each shard in turn, uint32 `(blocks, 2)`: all that the
                 sample order needs, so that a run of 20,000 shards opens one file to begin with

A document belongs to the block of its shard in which it begins, and is packed with those of the same block. No sample
lies in two blocks; those of a shard are in the order of its blocks.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash

from data_pipeline.config import DEFAULT_BLOCK_BYTES
from data_pipeline.manifest import Manifest, PackInfo
from data_pipeline.packing import pack_documents
from data_pipeline.samples import Extents, placed
from data_pipeline.shards import ShardInfo, parse_index, write_atomically

KEPT_SHARDS = 16
"""Shards whose bins are kept in memory: those of two groups of shuffle blocks, some 5 MB for each GiB of tokens."""


@dataclass(frozen=True)
class PackedShard:
    """What packing a shard has come to: plain numbers, which a work unit can leave as JSON."""

    xxh3: str
    """Of its file, xxh3-64 in hexadecimal."""
    block_samples: tuple[int, ...]
    """Of each shuffle block; 0 where no document begins in it."""
    block_tokens: tuple[int, ...]
    cut_documents: int
    """Documents longer than T."""


def plan_packing(
    folder: str | Path,
    sequence_length: int,
    block_bytes: int = DEFAULT_BLOCK_BYTES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackInfo:
    """Pack the documents of a finished data folder for one sequence length, and enter it into the manifest.

    Args:
        folder: on this machine.
        sequence_length: T.
        block_bytes: of a shuffle block; a run's `data.shuffle_block_bytes` must be the same.
        on_progress: told tokens done and in all, after each shard.

    Raises:
        ValueError: it is no finished data folder, or an index of it is damaged, or a block has no room for a sample.
        OSError: the disk is full or the like. The folder stays as it was.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    block_tokens = block_tokens_of(manifest.numpy_dtype, sequence_length, block_bytes)
    packed = []
    done = 0
    for shard in manifest.shards:
        packed.append(pack_shard(folder, shard, sequence_length, block_tokens))
        done += shard.tokens
        on_progress(done, manifest.tokens)
    info = finish_packing(folder, manifest.shards, packed, sequence_length, block_tokens)
    with_pack(manifest, info).save(folder)
    return info


def block_tokens_of(dtype: np.dtype, sequence_length: int, block_bytes: int) -> int:
    """Tokens of a shuffle block.

    Raises:
        ValueError: a sample does not fit, or the sequence length is none.
    """
    if sequence_length < 1:
        raise ValueError(f"a sequence length of {sequence_length} was to be packed for, but it must be at least 1")
    block_tokens = block_bytes // dtype.itemsize
    if block_tokens < sequence_length:
        raise ValueError(
            f"a shuffle block of {block_tokens} tokens is shorter than the sequence length {sequence_length}: "
            "raise the size of a block"
        )
    return block_tokens


def pack_shard(folder: Path, shard: ShardInfo, sequence_length: int, block_tokens: int) -> PackedShard:
    """Write `NAME.pack{T}` of a shard: a unit of work, which depends on its `.idx` alone.

    Raises:
        ValueError: the index is missing or damaged.
        OSError: the disk is full or the like.
    """
    count = _document_tokens(folder, shard)
    start = np.cumsum(count) - count
    blocks = _blocks_of(shard, block_tokens)
    # The first document of each block, and their number last.
    edges = np.searchsorted(start, np.arange(blocks + 1) * block_tokens).tolist()
    packed = [
        pack_documents(start[begin:end], count[begin:end], sequence_length) for begin, end in itertools.pairwise(edges)
    ]
    content = _serialized(packed, shard)
    write_atomically(folder / f"{shard.name}.pack{sequence_length}", content)
    return PackedShard(
        xxh3=xxhash.xxh3_64_hexdigest(content),
        block_samples=tuple(map(len, packed)),
        block_tokens=tuple(int(extents.count.sum()) for extents in packed),
        cut_documents=int(np.count_nonzero(count > sequence_length)),
    )


def finish_packing(
    folder: Path, shards: Sequence[ShardInfo], packed: Sequence[PackedShard], sequence_length: int, block_tokens: int
) -> PackInfo:
    """Write `pack{T}.blocks`, once all shards are packed. `packed`: of each of the `shards`.

    Raises:
        OSError: the disk is full or the like.
    """
    assert len(packed) == len(shards)
    assert all(sum(of.block_tokens) == shard.tokens for of, shard in zip(packed, shards, strict=True))
    table = np.array(
        [row for of in packed for row in zip(of.block_samples, of.block_tokens, strict=True)], dtype="<u4"
    ).tobytes()
    samples = sum(sum(of.block_samples) for of in packed)
    tokens = sum(shard.tokens for shard in shards)
    info = PackInfo(
        sequence_length=sequence_length,
        block_tokens=block_tokens,
        samples=samples,
        tokens=tokens,
        padding_tokens=samples * sequence_length - tokens,
        cut_documents=sum(of.cut_documents for of in packed),
        blocks_xxh3=xxhash.xxh3_64_hexdigest(table),
        shard_xxh3=tuple(of.xxh3 for of in packed),
    )
    write_atomically(folder / info.blocks_name, table)
    return info


def with_pack(manifest: Manifest, info: PackInfo) -> Manifest:
    """The manifest with this pack, in place of one for the same sequence length."""
    others = [pack for pack in manifest.packs if pack.sequence_length != info.sequence_length]
    return replace(manifest, packs=tuple(sorted([*others, info], key=lambda pack: pack.sequence_length)))


def find_pack(manifest: Manifest, path: str, sequence_length: int) -> PackInfo:
    """The pack of a data folder for a sequence length. `path`: of the folder, for the error.

    Raises:
        ValueError: there is none.
    """
    for info in manifest.packs:
        if info.sequence_length == sequence_length:
            return info
    known = ", ".join(str(info.sequence_length) for info in manifest.packs) or "none"
    raise ValueError(
        f"data folder {path} is not packed for sequence length {sequence_length} (it is for: {known}): run "
        f"`steppe data prepare ... --out {path} --pack {sequence_length}`, or use packing: concatenate"
    )


class PackedSamples:
    """`Samples` of whole documents, as a pack has them; files are opened, and verified, when samples are asked for."""

    def __init__(self, manifest: Manifest, info: PackInfo, read_file: Callable[[str, str], bytes]) -> None:
        """Open a pack.

        Args:
            manifest: of the data folder.
            info: one of its packs.
            read_file: gives a file of the folder by its name and its xxh3-64, which it checks.

        Raises:
            ValueError: the pack's file of blocks is missing or damaged.
        """
        self.sequence_length = info.sequence_length
        table = np.frombuffer(read_file(info.blocks_name, info.blocks_xxh3), dtype="<u4").reshape(-1, 2)
        self.block_samples = table[:, 0].astype(np.int64)
        self.block_tokens = table[:, 1].astype(np.int64)
        self._shards = manifest.shards
        self._info = info
        self._read_file = read_file
        # What comes before each shard, and last what there is in all.
        self._first_tokens = np.cumsum([0] + [shard.tokens for shard in self._shards])
        blocks = np.cumsum([0] + [_blocks_of(shard, info.block_tokens) for shard in self._shards])
        self._first_samples = np.concatenate([[0], np.cumsum(self.block_samples)])[blocks]
        assert blocks[-1] == len(table)
        assert self._first_samples[-1] == info.samples
        self._shard = lru_cache(maxsize=KEPT_SHARDS)(self._open_shard)

    def extents(self, numbers: np.ndarray) -> Extents:
        """See `Samples`.

        Raises:
            ValueError: a file of the pack is missing or damaged.
        """
        shard_of = np.searchsorted(self._first_samples, numbers, side="right") - 1
        parts = []
        for shard in np.unique(shard_of).tolist():
            places = np.flatnonzero(shard_of == shard)
            found = self._shard(shard).extents(numbers[places] - self._first_samples[shard])
            parts.append((places, Extents(found.first, found.start + self._first_tokens[shard], found.count)))
        return placed(parts)

    def _open_shard(self, number: int) -> "_ShardBins":
        shard = self._shards[number]
        content = self._read_file(self._info.name_of(shard), self._info.shard_xxh3[number])
        samples = int(self._first_samples[number + 1] - self._first_samples[number])
        return _ShardBins(content, samples, _extent_dtype(shard))


class _ShardBins:
    """The file of one shard; its narrow arrays stay as they are stored."""

    def __init__(self, content: bytes, samples: int, dtype: np.dtype) -> None:
        self._first = np.frombuffer(content, dtype="<u4", count=samples + 1)
        extents = int(self._first[-1])
        self._start, self._count = np.frombuffer(content, dtype=dtype, offset=self._first.nbytes).reshape(2, extents)

    def extents(self, numbers: np.ndarray) -> Extents:
        """Of samples by their numbers in the shard `(n,)`; starts are within the shard."""
        begin, end = self._first[numbers].astype(np.int64), self._first[numbers + 1].astype(np.int64)
        first = np.concatenate([[0], np.cumsum(end - begin)])
        chosen = np.repeat(begin - first[:-1], end - begin) + np.arange(first[-1])
        return Extents(first, self._start[chosen].astype(np.int64), self._count[chosen].astype(np.int64))


def _serialized(packed: Sequence[Extents], shard: ShardInfo) -> bytes:
    """The file of one shard. `packed`: of each of its blocks."""
    begin = np.cumsum([0, *map(len, packed)])
    extents = placed([(begin[i] + np.arange(len(of)), of) for i, of in enumerate(packed)])
    assert len(extents.start) < 1 << 32
    dtype = _extent_dtype(shard)
    return b"".join(
        [
            extents.first.astype("<u4").tobytes(),
            extents.start.astype(dtype).tobytes(),
            extents.count.astype(dtype).tobytes(),
        ]
    )


def _extent_dtype(shard: ShardInfo) -> np.dtype:
    return np.dtype("<u4" if shard.tokens <= 1 << 32 else "<i8")


def _blocks_of(shard: ShardInfo, block_tokens: int) -> int:
    return -(-shard.tokens // block_tokens)


def _document_tokens(folder: Path, shard: ShardInfo) -> np.ndarray:
    """Tokens of each document of a shard: int64 `(documents,)`."""
    path = folder / f"{shard.name}.idx"
    content = path.read_bytes()
    lengths, _ = parse_index(content, str(path))
    if xxhash.xxh3_64_hexdigest(content) != shard.idx_xxh3:
        raise ValueError(f"{path} is damaged: run `steppe data verify {folder}` to see all damage")
    return lengths.astype(np.int64)
