"""Runs of tokens out of a prepared data folder, here or elsewhere; nothing leaves it unverified."""

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np

from data_pipeline.config import CacheConfig, SourceConfig
from data_pipeline.data_folder import OpenShard, open_folder
from data_pipeline.manifest import Manifest
from data_pipeline.shards import HASH_BLOCK_BYTES

OPEN_SHARDS = 32
"""Shards held open at once. A group of shuffle blocks touches few; thousands would meet the limit on open files."""


class TokenSource:
    """One data folder as a token stream: the concatenation of its shards, at any place.

    Not for use by two threads at once.
    """

    def __init__(self, path: str, manifest: Manifest | None = None, cache: CacheConfig | None = None) -> None:
        """Take up a data folder; files of it are opened when tokens of theirs are read.

        Args:
            path: a folder, or the URL of one.
            manifest: the folder's, if it has been loaded already, perhaps by another rank.
            cache: where a folder that lies elsewhere is kept meanwhile.

        Raises:
            ValueError: the folder is missing or unfinished, or lies elsewhere and the cache has no folder.
        """
        self.manifest = manifest or Manifest.load(path)
        self.tokens = self.manifest.tokens
        self.dtype = self.manifest.numpy_dtype
        self._folder = open_folder(path, self.manifest, cache or CacheConfig())
        self._shards = self.manifest.shards
        # Where each shard begins in the stream, and last where the stream ends.
        self._starts = np.cumsum([0] + [shard.tokens for shard in self._shards])
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        # One bit a block for all time, of the shards that were touched; 20 TB of tokens have 38 MB of them.
        self._verified: dict[int, bytearray] = {}
        self._scratch = np.empty(HASH_BLOCK_BYTES, dtype=np.uint8)

    @property
    def waits(self) -> int:
        """How often a read had to wait until data was fetched from elsewhere, because no prefetch had done it."""
        return self._folder.waits

    def read(self, starts: np.ndarray, counts: np.ndarray, out: np.ndarray, at: np.ndarray) -> None:
        """Copy runs of tokens of the stream: `out[at[i] : at[i] + counts[i]]` becomes the i-th.

        Args:
            starts: first token of each run `(n,)`.
            counts: tokens of each `(n,)`.
            out: 1-D, contiguous, of the manifest's dtype.
            at: place of each in `out` `(n,)`.

        Raises:
            ValueError: a block that a run touches is not what was written, or is not there.
            OSError: it cannot be had now.
        """
        assert out.ndim == 1
        assert out.dtype == self.dtype
        if not len(starts):
            return
        assert starts.min() >= 0 <= counts.min()
        assert (starts + counts).max() <= self.tokens
        itemsize = self.dtype.itemsize
        shards = np.searchsorted(self._starts, starts, side="right") - 1
        offsets = (starts - self._starts[shards]) * itemsize
        begins, ends = at * itemsize, (at + counts) * itemsize
        target = out.view(np.uint8).data
        for shard, offset, begin, end in zip(
            shards.tolist(), offsets.tolist(), begins.tolist(), ends.tolist(), strict=True
        ):
            self._read_bytes(shard, offset, target[begin:end])

    def read_tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens `[start, start + count)` of the stream, in the manifest's dtype. Raises what `read` does."""
        out = np.empty(count, dtype=self.dtype)
        self.read(np.array([start]), np.array([count]), out, np.array([0]))
        return out

    def prefetch(self, starts: np.ndarray, counts: np.ndarray) -> None:
        """Say which runs of tokens will be read next, in this order, so that they are fetched ahead in the background.

        Returns at once, fails never (a read will), and is a no-op where nothing is fetched from elsewhere.
        """
        self._folder.prefetch(starts, counts)

    def read_file(self, name: str, xxh3: str) -> bytes:
        """A (small) file of the folder as a whole, checked against its xxh3-64 in hexadecimal.

        Raises:
            ValueError: it is missing or damaged.
            OSError: it cannot be had now.
        """
        return self._folder.read_file(name, xxh3)

    def close(self) -> None:
        """Stop to fetch, and close what is open; the source may be read on, and opens again what it needs."""
        while self._open:
            self._open.popitem()[1].close()
        self._folder.close()

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

    def _open_shard(self, shard: int) -> OpenShard:
        if len(self._open) >= OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        opened = self._open[shard] = self._folder.open_shard(shard)
        self._verified.setdefault(shard, bytearray(-(-self._shards[shard].blocks // 8)))
        return opened


def open_sources(
    sources: tuple[SourceConfig, ...], manifests: Mapping[str, Manifest], cache: CacheConfig | None = None
) -> dict[str, TokenSource]:
    """Open the sources of a run by name. `manifests`: those that have been loaded already, by path.

    Raises:
        ValueError: a folder is unusable, or two were prepared with different tokenizers.
    """
    opened = {source.name: TokenSource(source.path, manifests.get(source.path), cache) for source in sources}
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
