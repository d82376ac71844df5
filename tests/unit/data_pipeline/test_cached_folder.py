"""Data folders on real servers, through the cache of this machine."""

import multiprocessing
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import cached_folder, remote, shard_cache
from data_pipeline.config import CacheConfig, DataConfig, SourceConfig
from data_pipeline.loader import Loader
from data_pipeline.manifest import Manifest
from data_pipeline.order import Stage
from data_pipeline.shards import HASH_BLOCK_BYTES
from data_pipeline.token_source import TokenSource
from tests.unit.data_pipeline.conftest import WriteFolder
from tests.unit.data_pipeline.servers import FileServer, file_server, point_at_s3, s3_server
from tests.unit.data_pipeline.test_verify import flip

CHUNK = 2 * HASH_BLOCK_BYTES
CHUNK_TOKENS = CHUNK // 2
TOKENS = np.random.default_rng(0).integers(3, 1000, 1_000_000)
CHUNKS = 17
"""Of 2 MB in 4 shards: 5, 5, 5 and 2."""
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cached_folder, shard_cache):
        monkeypatch.setattr(module, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(remote, "ATTEMPTS", 3)


@pytest.fixture
def folder(write_folder: WriteFolder) -> Path:
    stored = TOKENS.tolist()
    return write_folder("data", [stored[i : i + 1000] for i in range(0, len(stored), 1000)], shard_bytes=580_000)


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    with file_server(folder.parent) as server:
        yield server


Open = Callable[..., TokenSource]


@pytest.fixture
def open_source(server: FileServer, tmp_path: Path) -> Iterator[Open]:
    opened = []

    def open_source(max_bytes: int = 64 * CHUNK) -> TokenSource:
        cache = CacheConfig(folder=str(tmp_path / "cache"), max_bytes=max_bytes)
        opened.append(TokenSource(f"{server.url}/data", cache=cache))
        return opened[-1]

    yield open_source
    for source in opened:
        source.close()


def check_runs(source: TokenSource, seed: int, runs: int = 200, length: int = 3000) -> None:
    starts = np.random.default_rng(seed).integers(0, len(TOKENS) - length, runs)
    out = np.empty((runs, length), dtype="<u2")
    source.read(starts, np.full(runs, length), out.reshape(-1), np.arange(runs) * length)
    assert np.array_equal(out, TOKENS[starts[:, None] + np.arange(length)])


def cached_files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache").rglob("*") if path.is_file() and path.name != "usage")


def test_what_is_read_is_what_was_written(open_source: Open, server: FileServer, tmp_path: Path) -> None:
    source = open_source()
    check_runs(source, 0)
    assert np.array_equal(source.read_tokens(0, len(TOKENS)), TOKENS)
    assert source.waits == CHUNKS
    once = Counter((request.path, request.range) for request in server.gets())
    assert set(once.values()) == {1}
    assert len(server.gets(".bin")) == CHUNKS
    assert len(server.gets(".xxh3")) == 4
    server.requests.clear()
    again = open_source()  # as another rank of the machine, or after a restart
    check_runs(again, 1)
    assert [request.path for request in server.requests] == ["/data/manifest.json"]
    assert again.waits == 0
    assert {path.stat().st_size for path in cached_files(tmp_path)} >= {CHUNK}


def test_a_cache_that_is_smaller_than_the_data(
    open_source: Open, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "SMALLEST_CACHE_CHUNKS", 6)
    source = open_source(max_bytes=6 * CHUNK)
    for seed in range(3):
        check_runs(source, seed, runs=30)
        assert sum(path.stat().st_size for path in cached_files(tmp_path)) <= 6 * CHUNK
    assert CHUNKS < len(server.gets(".bin")) == source.waits


def read_as_a_rank(url: str, manifest: Manifest, cache: CacheConfig, seed: int) -> None:
    source = TokenSource(url, manifest, cache)
    check_runs(source, seed)
    source.close()


def test_ranks_of_a_machine_fetch_once_together(folder: Path, server: FileServer, tmp_path: Path) -> None:
    server.latency_seconds = 0.005
    cache = CacheConfig(folder=str(tmp_path / "cache"), max_bytes=64 * CHUNK)
    ranks = [
        FORK.Process(target=read_as_a_rank, args=(f"{server.url}/data", Manifest.load(folder), cache, seed))
        for seed in range(5)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    assert len(server.gets(".bin")) == CHUNKS
    assert len(server.gets(".xxh3")) == 4


def test_damage_in_the_cache_is_fetched_again(open_source: Open, server: FileServer, tmp_path: Path) -> None:
    check_runs(open_source(), 0)
    files = cached_files(tmp_path)
    for path in files:
        flip(path, path.stat().st_size // 2)
    server.requests.clear()
    check_runs(open_source(), 1)
    assert len(server.gets(".bin")) == CHUNKS
    assert len(server.gets(".xxh3")) == 4
    for path in files[::2]:
        os.truncate(path, path.stat().st_size // 3)
    server.requests.clear()
    check_runs(open_source(), 2)
    assert len(server.gets(".bin")) + len(server.gets(".xxh3")) == len(files[::2])


def test_damage_at_the_source_is_told_before_use(open_source: Open, server: FileServer, folder: Path) -> None:
    flip(folder / "shard_00001.bin", 3 * HASH_BLOCK_BYTES + 5)
    source = open_source()
    out = np.zeros(10, dtype="<u2")
    # Block 3 is in the same chunk as block 2: nothing of the chunk enters the cache.
    start = 290_000 + 2 * HASH_BLOCK_BYTES // 2
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=rf"^shard {server.url}/data/shard_00001\.bin is damaged in block 3 \(bytes 196608 to 262144\): "
            rf"run `steppe data verify {server.url}/data` to see all damage, then copy it again",
        ):
            source.read(np.array([start]), np.array([10]), out, np.array([0]))
        assert not out.any()
    assert not [path for path in cached_files(folder.parent) if path.match("shard_00001.bin/*")]
    check_tokens = source.read_tokens(290_000, 2 * HASH_BLOCK_BYTES // 2)
    assert np.array_equal(check_tokens, TOKENS[290_000 : 290_000 + HASH_BLOCK_BYTES])
    shutil.copy(folder / "shard_00001.idx", folder / "shard_00002.xxh3")
    with pytest.raises(ValueError, match=r"/data/shard_00002\.xxh3 is damaged: run `steppe data verify http"):
        source.read_tokens(290_000 * 2, 1)


@pytest.mark.parametrize("suffix", ["bin", "xxh3"])
def test_a_missing_file(open_source: Open, server: FileServer, folder: Path, suffix: str) -> None:
    (folder / f"shard_00001.{suffix}").unlink()
    with pytest.raises(ValueError, match=rf"^{server.url}/data/shard_00001\.{suffix} is missing: copy it again"):
        open_source().read_tokens(290_000, 1)


def test_a_shard_that_is_cut_short(open_source: Open, server: FileServer, folder: Path) -> None:
    os.truncate(folder / "shard_00000.bin", 500_000)
    source = open_source()
    source.read_tokens(0, 100_000)
    with pytest.raises(ValueError, match=r"shard_00000\.bin has 500,000 bytes, but byte 524,287 was asked for"):
        source.read_tokens(249_000, 2000)


def test_faults_of_the_server(open_source: Open, server: FileServer) -> None:
    source = open_source()
    server.faults.extend(["503", "truncated", "none", "reset", "none", "short", "none", "503", "truncated", "none"])
    assert np.array_equal(source.read_tokens(0, len(TOKENS)), TOKENS)
    server.always = "503"
    with pytest.raises(OSError, match=r"reading http://.* failed 3 times in 0 s, at last by: HTTP status 503"):
        open_source(64 * CHUNK)
    assert np.array_equal(source.read_tokens(0, len(TOKENS)), TOKENS), "all of it is here"


def test_once_warm_a_reader_does_not_wait(open_source: Open, server: FileServer) -> None:
    """Batches are announced some ahead, as the loader does, over a server that takes its time."""
    order = np.random.default_rng(0).permutation(196) * 5000
    batches = [order[i : i + 4] for i in range(0, len(order), 4)]
    counts = np.full(4, 5001)
    source = open_source(max_bytes=64 * CHUNK)
    server.latency_seconds = 0.03
    warm = 12
    for batch in batches[:warm]:
        source.prefetch(batch, counts)
    time.sleep(0.5)
    for number, batch in enumerate(batches):
        if number + warm < len(batches):
            source.prefetch(batches[number + warm], counts)
        source.read(batch, counts, np.empty(4 * 5001, dtype="<u2"), np.arange(4) * 5001)
        time.sleep(0.01)
    assert source.waits == 0
    assert len(server.gets(".bin")) == CHUNKS


def test_a_loader_over_a_server(folder: Path, server: FileServer, tmp_path: Path) -> None:
    """It has the batches that it has from a local folder, and once it has begun it does not wait for chunks."""
    local = DataConfig(
        sequence_length=200,
        sources=(SourceConfig(name="a", path=str(folder)),),
        shuffle_block_bytes=CHUNK,
        shuffle_group_blocks=2,
        cache=CacheConfig(folder=str(tmp_path / "cache"), max_bytes=64 * CHUNK),
    )
    far = local.model_copy(update={"sources": (SourceConfig(name="a", path=f"{server.url}/data"),)})
    plan = [(first, 64) for first in range(0, 64 * 70, 64)]
    server.latency_seconds = 0.02
    loaders = [Loader(data, 0, [Stage(0, {"a": 1.0}, 200)], 0, 1, 32, False, iter(plan)) for data in (local, far)]
    (source,) = loaders[1]._opened
    for number, (here, there) in enumerate(zip(*loaders, strict=True)):
        assert [batch.tokens.tolist() for batch in here] == [batch.tokens.tolist() for batch in there]
        if number == 0:
            time.sleep(0.5)  # a first step takes its time, too
            waits_of_the_first = source.waits
        time.sleep(0.01)
    assert number == 69
    assert source.waits == waits_of_the_first < CHUNKS
    assert len(server.gets(".bin")) == CHUNKS
    for loader in loaders:
        loader.close()


def test_prefetch_stays_within_half_of_the_cache(open_source: Open, server: FileServer) -> None:
    source = open_source(max_bytes=16 * CHUNK)
    source.prefetch(np.arange(0, 900_000, 30_000), np.full(30, 1000))
    deadline = time.monotonic() + 5
    while len(server.gets(".bin")) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    fetched = {(request.path, request.range) for request in server.gets(".bin")}
    chunks = [("/data/shard_00000.bin", chunk) for chunk in range(5)] + [
        ("/data/shard_00001.bin", chunk) for chunk in range(3)
    ]
    assert fetched == {
        (path, f"bytes={chunk * CHUNK}-{min((chunk + 1) * CHUNK, 580_000) - 1}") for path, chunk in chunks
    }
    source.read_tokens(0, 1)
    while len(server.gets(".bin")) < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(server.gets(".bin")) == 9


def test_a_crash_loses_little(folder: Path, server: FileServer, tmp_path: Path, open_source: Open) -> None:
    """Ranks are killed at any moment; what had been fetched by then is not fetched again."""
    server.latency_seconds = 0.01
    cache = CacheConfig(folder=str(tmp_path / "cache"), max_bytes=64 * CHUNK)
    killed = 0
    for seed in range(6):
        rank = FORK.Process(target=read_as_a_rank, args=(f"{server.url}/data", Manifest.load(folder), cache, seed))
        rank.start()
        time.sleep(0.08)
        assert rank.pid is not None
        if rank.exitcode is None:
            os.kill(rank.pid, signal.SIGKILL)
            killed += 1
        rank.join()
    check_runs(open_source(), 9)
    assert killed > 1
    assert len(server.gets(".bin")) <= CHUNKS + killed


def test_a_local_folder_through_the_cache(folder: Path, tmp_path: Path) -> None:
    cache = CacheConfig(folder=str(tmp_path / "cache"), max_bytes=64 * CHUNK, local_sources=True)
    source = TokenSource(str(folder), cache=cache)
    check_runs(source, 0)
    source.close()
    assert len([path for path in cached_files(tmp_path) if path.parent.suffix == ".bin"]) == CHUNKS
    shutil.rmtree(tmp_path / "cache")
    source = TokenSource(f"file://{folder}", cache=cache.model_copy(update={"local_sources": False}))
    check_runs(source, 0)
    source.close()
    assert not (tmp_path / "cache").exists()


def test_a_remote_folder_needs_a_cache(server: FileServer) -> None:
    with pytest.raises(
        ValueError, match=rf"^data folder {server.url}/data is not on this machine: set data.cache.folder to a folder"
    ):
        TokenSource(f"{server.url}/data")


def test_a_server_without_ranges(open_source: Open, server: FileServer) -> None:
    server.ranges = False
    with pytest.raises(ValueError, match=re.escape("its server ignores Range requests; copy it here")):
        open_source().read_tokens(0, 1)


@pytest.mark.slow
def test_s3(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as endpoint:
        point_at_s3(monkeypatch, endpoint)
        file_system, _ = remote.open_path("s3://cached-test")
        file_system.mkdir("cached-test")
        file_system.put(f"{folder}/", "cached-test/data/", recursive=True)
        cache = CacheConfig(folder=str(tmp_path / "cache"), max_bytes=64 * CHUNK)
        source = TokenSource("s3://cached-test/data", cache=cache)
        check_runs(source, 0)
        source.close()
        content = bytearray((folder / "shard_00000.bin").read_bytes())
        content[HASH_BLOCK_BYTES + 3] ^= 1
        file_system.pipe_file("cached-test/data/shard_00000.bin", bytes(content))
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(ValueError, match=r"^shard s3://cached-test/data/shard_00000\.bin is damaged in block 1 "):
            TokenSource("s3://cached-test/data", cache=cache).read_tokens(0, 1)
