"""A data folder on a real server, and readers of it through the cache of this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import cached_folder, retries, shard_cache
from data_pipeline.config import CacheConfig
from data_pipeline.manifest import Manifest
from data_pipeline.shards import HASH_BLOCK_BYTES
from data_pipeline.token_source import TokenSource
from tests.unit.data_pipeline.conftest import WriteFolder
from tests.unit.data_pipeline.servers import FileServer, file_server

CHUNK = 2 * HASH_BLOCK_BYTES
TOKENS = np.random.default_rng(0).integers(3, 1000, 1_000_000)
SHARD_TOKENS = 290_000
CHUNKS = 17
"""Of 2 MB in 4 shards: 5, 5, 5 and 2."""


@dataclass
class FarFolder:
    """It lies at `path`, is served at `url`, and kept in `cache`."""

    path: Path
    server: FileServer
    cache: CacheConfig
    opened: list[TokenSource] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{self.server.url}/{self.path.name}"

    def open(self, max_bytes: int = 64 * CHUNK) -> TokenSource:
        """As a rank of this machine does."""
        cache = self.cache.model_copy(update={"max_bytes": max_bytes})
        self.opened.append(TokenSource(self.url, cache=cache))
        return self.opened[-1]

    @property
    def cache_folder(self) -> Path:
        assert self.cache.folder is not None
        return Path(self.cache.folder)

    def cached(self) -> list[Path]:
        """Entries of the cache."""
        return sorted(path for path in self.cache_folder.rglob("*") if path.is_file() and path.name != "usage")


@contextmanager
def serve_far_folder(write_folder: WriteFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[FarFolder]:
    """With small chunks, and retries that do not wait."""
    for module in (cached_folder, shard_cache):
        monkeypatch.setattr(module, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(retries, "ATTEMPTS", 3)
    stored = TOKENS.tolist()
    documents = [stored[i : i + 1000] for i in range(0, len(stored), 1000)]
    path = write_folder("data", documents, shard_bytes=2 * SHARD_TOKENS)
    with file_server(path.parent) as server:
        far = FarFolder(path, server, CacheConfig(folder=str(path.parent / "cache"), max_bytes=64 * CHUNK))
        yield far
        for source in far.opened:
            source.close()


def check_runs(source: TokenSource, seed: int, runs: int = 200, length: int = 3000) -> None:
    """Read runs of tokens anywhere: they are what was written."""
    starts = np.random.default_rng(seed).integers(0, len(TOKENS) - length, runs)
    out = np.empty((runs, length), dtype="<u2")
    source.read(starts, np.full(runs, length), out.reshape(-1), np.arange(runs) * length)
    assert np.array_equal(out, TOKENS[starts[:, None] + np.arange(length)])


def read_as_a_rank(url: str, manifest: Manifest, cache: CacheConfig, seed: int) -> None:
    """In a process of its own."""
    source = TokenSource(url, manifest, cache)
    check_runs(source, seed)
    source.close()
