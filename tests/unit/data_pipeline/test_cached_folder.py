"""Data folders on real servers, through the cache of this machine: what is read, and what goes wrong."""

import multiprocessing
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from data_pipeline import shard_cache
from data_pipeline.manifest import Manifest
from data_pipeline.remote import open_path
from data_pipeline.shards import HASH_BLOCK_BYTES
from data_pipeline.token_source import TokenSource
from tests.unit.data_pipeline.conftest import WriteFolder
from tests.unit.data_pipeline.far_folder import (
    CHUNK,
    CHUNKS,
    SHARD_TOKENS,
    TOKENS,
    FarFolder,
    check_runs,
    read_as_a_rank,
    serve_far_folder,
)
from tests.unit.data_pipeline.servers import point_at_s3, s3_server
from tests.unit.data_pipeline.test_verify import flip

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def far(write_folder: WriteFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[FarFolder]:
    with serve_far_folder(write_folder, monkeypatch) as far:
        yield far


def test_what_is_read_is_what_was_written(far: FarFolder) -> None:
    source = far.open()
    check_runs(source, 0)
    assert np.array_equal(source.read_tokens(0, len(TOKENS)), TOKENS)
    assert source.waits == CHUNKS
    once = Counter((request.path, request.range) for request in far.server.gets())
    assert set(once.values()) == {1}
    assert len(far.server.gets(".bin")) == CHUNKS
    assert len(far.server.gets(".xxh3")) == 4
    far.server.requests.clear()
    again = far.open()  # as another rank of the machine, or after a restart
    check_runs(again, 1)
    assert [request.path for request in far.server.requests] == ["/data/manifest.json"]
    assert again.waits == 0
    assert {path.stat().st_size for path in far.cached()} >= {CHUNK}


def test_a_cache_that_is_smaller_than_the_data(far: FarFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "SMALLEST_CACHE_CHUNKS", 6)
    source = far.open(max_bytes=6 * CHUNK)
    for seed in range(3):
        check_runs(source, seed, runs=30)
        assert sum(path.stat().st_size for path in far.cached()) <= 6 * CHUNK
    assert CHUNKS < len(far.server.gets(".bin")) == source.waits


def test_ranks_of_a_machine_fetch_once_together(far: FarFolder) -> None:
    far.server.latency_seconds = 0.005
    ranks = [
        FORK.Process(target=read_as_a_rank, args=(far.url, Manifest.load(far.path), far.cache, seed))
        for seed in range(5)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    assert len(far.server.gets(".bin")) == CHUNKS
    assert len(far.server.gets(".xxh3")) == 4


def test_damage_in_the_cache_is_fetched_again(far: FarFolder) -> None:
    check_runs(far.open(), 0)
    files = far.cached()
    for path in files:
        flip(path, path.stat().st_size // 2)
    far.server.requests.clear()
    check_runs(far.open(), 1)
    assert len(far.server.gets(".bin")) == CHUNKS
    assert len(far.server.gets(".xxh3")) == 4
    for path in files[::2]:
        os.truncate(path, path.stat().st_size // 3)
    far.server.requests.clear()
    check_runs(far.open(), 2)
    assert len(far.server.gets(".bin")) + len(far.server.gets(".xxh3")) == len(files[::2])


def test_damage_at_the_source_is_told_before_use(far: FarFolder) -> None:
    flip(far.path / "shard_00001.bin", 3 * HASH_BLOCK_BYTES + 5)
    source = far.open()
    out = np.zeros(10, dtype="<u2")
    # Block 3 is in the same chunk as block 2: nothing of the chunk enters the cache.
    start = SHARD_TOKENS + 2 * HASH_BLOCK_BYTES // 2
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=rf"^shard {far.url}/shard_00001\.bin is damaged in block 3 \(bytes 196608 to 262144\): "
            rf"run `steppe data verify {far.url}` to see all damage, then copy it again",
        ):
            source.read(np.array([start]), np.array([10]), out, np.array([0]))
        assert not out.any()
    assert not [path for path in far.cached() if path.match("shard_00001.bin/*")]
    check_tokens = source.read_tokens(SHARD_TOKENS, 2 * HASH_BLOCK_BYTES // 2)
    assert np.array_equal(check_tokens, TOKENS[SHARD_TOKENS : SHARD_TOKENS + HASH_BLOCK_BYTES])
    shutil.copy(far.path / "shard_00001.idx", far.path / "shard_00002.xxh3")
    with pytest.raises(ValueError, match=r"/data/shard_00002\.xxh3 is damaged: run `steppe data verify http"):
        source.read_tokens(SHARD_TOKENS * 2, 1)


@pytest.mark.parametrize("suffix", ["bin", "xxh3"])
def test_a_missing_file(far: FarFolder, suffix: str) -> None:
    (far.path / f"shard_00001.{suffix}").unlink()
    with pytest.raises(ValueError, match=rf"^{far.url}/shard_00001\.{suffix} is missing: copy it again"):
        far.open().read_tokens(SHARD_TOKENS, 1)


def test_a_shard_that_is_cut_short(far: FarFolder) -> None:
    os.truncate(far.path / "shard_00000.bin", 500_000)
    source = far.open()
    source.read_tokens(0, 100_000)
    with pytest.raises(ValueError, match=r"shard_00000\.bin has 500,000 bytes, but byte 524,287 was asked for"):
        source.read_tokens(249_000, 2000)


def test_faults_of_the_server(far: FarFolder) -> None:
    source = far.open()
    far.server.faults.extend(["503", "truncated", "none", "reset", "none", "short", "none", "503", "truncated", "none"])
    assert np.array_equal(source.read_tokens(0, len(TOKENS)), TOKENS)
    far.server.always = "503"
    with pytest.raises(OSError, match=r"reading http://.* failed 3 times in 0 s, at last by: HTTP status 503"):
        far.open()
    assert np.array_equal(source.read_tokens(0, len(TOKENS)), TOKENS), "all of it is here"


def test_a_local_folder_through_the_cache(far: FarFolder) -> None:
    source = TokenSource(str(far.path), cache=far.cache.model_copy(update={"local_sources": True}))
    check_runs(source, 0)
    source.close()
    assert len([path for path in far.cached() if path.parent.suffix == ".bin"]) == CHUNKS
    shutil.rmtree(far.cache_folder)
    source = TokenSource(f"file://{far.path}", cache=far.cache)
    check_runs(source, 0)
    source.close()
    assert not far.cache_folder.exists()


def test_a_remote_folder_needs_a_cache(far: FarFolder) -> None:
    with pytest.raises(
        ValueError, match=rf"^data folder {far.url} is not on this machine: set data.cache.folder to a folder"
    ):
        TokenSource(far.url)


def test_a_server_without_ranges(far: FarFolder) -> None:
    far.server.ranges = False
    with pytest.raises(ValueError, match=re.escape("its server ignores Range requests; copy it here")):
        far.open().read_tokens(0, 1)


@pytest.mark.slow
def test_s3(far: FarFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as endpoint:
        point_at_s3(monkeypatch, endpoint)
        file_system, _ = open_path("s3://cached-test")
        file_system.mkdir("cached-test")
        file_system.put(f"{far.path}/", "cached-test/data/", recursive=True)
        source = TokenSource("s3://cached-test/data", cache=far.cache)
        check_runs(source, 0)
        source.close()
        content = bytearray((far.path / "shard_00000.bin").read_bytes())
        content[HASH_BLOCK_BYTES + 3] ^= 1
        file_system.pipe_file("cached-test/data/shard_00000.bin", bytes(content))
        shutil.rmtree(far.cache_folder)
        with pytest.raises(ValueError, match=r"^shard s3://cached-test/data/shard_00000\.bin is damaged in block 1 "):
            TokenSource("s3://cached-test/data", cache=far.cache).read_tokens(0, 1)
