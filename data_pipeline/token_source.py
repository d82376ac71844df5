"""Windows of tokens out of a prepared data folder; nothing leaves it unverified.

Reads by `preadv` rather than through a memory map, where a truncated file is a SIGBUS instead of an error.
"""

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash

from data_pipeline.config import SourceConfig
from data_pipeline.manifest import Manifest
from data_pipeline.shards import HASH_BLOCK_BYTES, ShardInfo

OPEN_SHARDS = 32
"""Shards held open at once. A group of shuffle blocks touches few; thousands would meet the limit on open files."""


class TokenSource:
    """One data folder, as windows of T + 1 tokens at stride T over the concatenation of its documents.

    Not for use by two threads at once.
    """

    def __init__(self, source: SourceConfig, sequence_length: int, manifest: Manifest | None = None) -> None:
        """Open a data folder. `manifest`: the folder's, if it has been loaded already, perhaps by another rank.

        Raises:
            ValueError: the folder is missing, unfinished or incomplete.
        """
        self.name = source.name
        self.manifest = manifest or Manifest.load(source.path)
        self.windows = max(0, self.manifest.tokens - 1) // sequence_length
        """Full windows; the tokens of one overlap the next by one, which is target here and input there."""
        self._folder = Path(source.path)
        self._T = sequence_length
        self._itemsize = self.manifest.numpy_dtype.itemsize
        self._shards = self.manifest.shards
        self._shard_starts = np.cumsum([0] + [shard.tokens for shard in self._shards])
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        # One bit a block for all time; 20 TB of tokens have 38 MB of them.
        self._verified = [bytearray(-(-shard.blocks // 8)) for shard in self._shards]
        self._scratch = np.empty(HASH_BLOCK_BYTES, dtype=np.uint8)

    def read(self, windows: np.ndarray, out: np.ndarray) -> None:
        """Fill `out` `(n, T + 1)`, of the manifest's dtype, with the given windows `(n,)`.

        Raises:
            ValueError: a block that a window touches is not what was written, or is not there.
        """
        assert out.shape == (len(windows), self._T + 1)
        assert out.dtype == self.manifest.numpy_dtype
        starts = windows * self._T
        shards = np.searchsorted(self._shard_starts, starts, side="right") - 1
        offsets = (starts - self._shard_starts[shards]) * self._itemsize
        rows = out.data.cast("B")
        row_bytes = (self._T + 1) * self._itemsize
        begin = 0
        for shard, offset in zip(shards.tolist(), offsets.tolist(), strict=True):
            self._read_bytes(shard, offset, rows[begin : begin + row_bytes])
            begin += row_bytes

    def read_tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens `[start, start + count)` of the concatenation, in the manifest's dtype."""
        assert 0 <= start <= start + count <= self.manifest.tokens
        out = np.empty(count, dtype=self.manifest.numpy_dtype)
        shard = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        self._read_bytes(shard, int(start - self._shard_starts[shard]) * self._itemsize, out.data.cast("B"))
        return out

    def close(self) -> None:
        """Close the open shards."""
        while self._open:
            self._open.popitem()[1].close()

    def _read_bytes(self, shard: int, offset: int, target: memoryview) -> None:
        """Fill the target from this place on, going on in the next shard where this one ends."""
        while target:
            count = min(len(target), self._shards[shard].bin_bytes - offset)
            if count:
                self._read_from_shard(shard, offset, target[:count])
            target, shard, offset = target[count:], shard + 1, 0

    def _read_from_shard(self, shard: int, offset: int, target: memoryview) -> None:
        opened = self._open.get(shard) or self._open_shard(shard)
        verified = self._verified[shard]
        for block in range(offset // HASH_BLOCK_BYTES, (offset + len(target) - 1) // HASH_BLOCK_BYTES + 1):
            if not verified[block >> 3] & 1 << (block & 7):
                opened.verify(block, self._scratch)
                verified[block >> 3] |= 1 << (block & 7)
        opened.read(offset, target)

    def _open_shard(self, shard: int) -> "_OpenShard":
        if len(self._open) >= OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        opened = self._open[shard] = _OpenShard(self._folder, self._shards[shard])
        return opened


class _OpenShard:
    def __init__(self, folder: Path, shard: ShardInfo) -> None:
        self._shard = shard
        self._path = folder / f"{shard.name}.bin"
        hashes_path = folder / f"{shard.name}.xxh3"
        hashes = hashes_path.read_bytes()
        if xxhash.xxh3_64_hexdigest(hashes) != shard.hashes_xxh3:
            raise ValueError(
                f"{hashes_path} is damaged: run `steppe data verify {folder}`, then prepare the data again"
            )
        self._hashes = np.frombuffer(hashes, dtype="<u8")
        self._descriptor = os.open(self._path, os.O_RDONLY)

    def read(self, offset: int, target: memoryview) -> None:
        if os.preadv(self._descriptor, [target], offset) != len(target):
            self._read_slowly(offset, target)

    def _read_slowly(self, offset: int, target: memoryview) -> None:
        """A read may be short at a signal or a network hiccup; it is an error only where the file ends."""
        while target:
            count = os.preadv(self._descriptor, [target], offset)
            if not count:
                raise ValueError(
                    f"shard {self._path} ends at byte {offset}, but the manifest says {self._shard.bin_bytes} bytes: "
                    "copy it again from where it was whole, or run `steppe data prepare` again"
                )
            target, offset = target[count:], offset + count

    def verify(self, block: int, scratch: np.ndarray) -> None:
        """Check the hash of one block.

        Raises:
            ValueError: it differs.
        """
        offset = block * HASH_BLOCK_BYTES
        content = scratch.data[: min(HASH_BLOCK_BYTES, self._shard.bin_bytes - offset)]
        self.read(offset, content)
        if xxhash.xxh3_64_intdigest(content) != self._hashes[block]:
            raise ValueError(
                f"shard {self._path} is damaged in block {block} (bytes {offset} to {offset + len(content)}): "
                f"run `steppe data verify {self._path.parent}` to see all damage, then prepare the data again"
            )

    def close(self) -> None:
        os.close(self._descriptor)


def open_sources(
    sources: tuple[SourceConfig, ...], sequence_length: int, manifests: Mapping[str, Manifest]
) -> dict[str, TokenSource]:
    """Open the sources of a run by name. `manifests`: those that have been loaded already, by path.

    Raises:
        ValueError: a folder is unusable, or two were prepared with different tokenizers.
    """
    opened = {s.name: TokenSource(s, sequence_length, manifests.get(s.path)) for s in sources}
    check_same_tokenizer({source.path: opened[source.name].manifest for source in sources})
    return opened


def check_same_tokenizer(manifests: dict[str, Manifest]) -> None:
    """Check that data folders, by path, speak one vocabulary.

    Raises:
        ValueError: two differ.
    """
    first_path, first = next(iter(manifests.items()))
    for path, manifest in manifests.items():
        if (manifest.tokenizer_fingerprint, manifest.vocab_size) != (first.tokenizer_fingerprint, first.vocab_size):
            raise ValueError(
                f"data folders {first_path} (vocabulary {first.vocab_size}, tokenizer {first.tokenizer_fingerprint}) "
                f"and {path} (vocabulary {manifest.vocab_size}, tokenizer {manifest.tokenizer_fingerprint}) were "
                "prepared with different tokenizers: prepare both with the same one"
            )
