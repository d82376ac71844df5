import os
import tracemalloc

import numpy as np
import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.manifest import Manifest
from data_pipeline.shards import HASH_BLOCK_BYTES, ShardInfo
from data_pipeline.token_source import TokenSource, open_sources
from tests.unit.data_pipeline.conftest import WriteFolder
from tests.unit.data_pipeline.test_verify import flip


def documents(tokens: int, length: int = 100) -> list[list[int]]:
    values = np.random.default_rng(0).integers(3, 1000, tokens).tolist()
    return [values[i : i + length] for i in range(0, tokens, length)]


def read(source: TokenSource, starts: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """Runs of tokens, read to places that are apart."""
    at = np.cumsum(counts + 1) - counts - 1
    out = np.full(int((counts + 1).sum()), 7777, dtype=source.dtype)
    source.read(starts, counts, out, at)
    assert (out[at + counts] == 7777).all(), "what lies between is left alone"
    return [out[place : place + count] for place, count in zip(at, counts, strict=True)]


@pytest.mark.parametrize("shard_bytes", [1 << 20, 400, 60])
def test_runs_may_lie_anywhere(write_folder: WriteFolder, shard_bytes: int) -> None:
    stored = documents(1000, length=7)
    source = TokenSource(str(write_folder("a", stored, shard_bytes=shard_bytes)))
    assert source.tokens == 1000
    tokens = np.concatenate(stored)
    generator = np.random.default_rng(0)
    for _ in range(20):
        starts = np.concatenate([[0, 1000, 0], generator.integers(0, 1000, 30)])
        counts = np.concatenate([[1000, 0, 0], generator.integers(0, 1001 - starts[3:])])
        for got, start, count in zip(read(source, starts, counts), starts, counts, strict=True):
            assert np.array_equal(got, tokens[start : start + count])
    assert np.array_equal(source.read_tokens(3, 600), tokens[3:603])
    assert read(source, np.array([], dtype=np.int64), np.array([], dtype=np.int64)) == []
    source.close()
    source.prefetch(starts, counts)
    assert np.array_equal(source.read_tokens(990, 10), tokens[990:])  # opens again what it needs
    with pytest.raises(AssertionError):
        source.read_tokens(990, 11)


def test_many_shards_need_few_open_files(write_folder: WriteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.token_source.OPEN_SHARDS", 3)
    source = TokenSource(str(write_folder("a", documents(4000), shard_bytes=400)))
    before = len(os.listdir("/proc/self/fd"))
    source.read_tokens(0, 4000)
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_damaged_block_is_found_where_it_is_touched(write_folder: WriteFolder) -> None:
    folder = write_folder("a", documents(100_000), shard_bytes=1 << 17)
    flip(folder / "shard_00001.bin", HASH_BLOCK_BYTES + 77)
    source = TokenSource(str(folder))
    shard_tokens = 65_500
    damaged_tokens = shard_tokens + HASH_BLOCK_BYTES // 2
    source.read_tokens(0, damaged_tokens)
    with pytest.raises(
        ValueError,
        match=rf"shard {folder}/shard_00001\.bin is damaged in block 1 \(bytes 65536 to 69000\): run `steppe data "
        rf"verify {folder}` to see all damage, then copy it again",
    ):
        source.read_tokens(damaged_tokens + 100, 1)
    # Also by a run that only reaches into the block, and before any of its tokens is in the batch.
    out = np.zeros(2, dtype="<u2")
    with pytest.raises(ValueError, match="damaged in block 1"):
        source.read(np.array([damaged_tokens]), np.array([2]), out, np.array([0]))
    assert not out.any()


def test_damaged_hashes_are_found(write_folder: WriteFolder) -> None:
    folder = write_folder("a", documents(1000))
    flip(folder / "shard_00000.xxh3", 3)
    with pytest.raises(ValueError, match=r"shard_00000\.xxh3 is damaged: run `steppe data verify"):
        TokenSource(str(folder)).read_tokens(0, 1)


@pytest.mark.parametrize("suffix", ["bin", "xxh3"])
def test_a_missing_file(write_folder: WriteFolder, suffix: str) -> None:
    folder = write_folder("a", documents(1000))
    (folder / f"shard_00000.{suffix}").unlink()
    with pytest.raises(ValueError, match=rf"{folder}/shard_00000\.{suffix} is missing: copy it again"):
        TokenSource(str(folder)).read_tokens(0, 1)


def test_a_shard_of_another_size(write_folder: WriteFolder) -> None:
    folder = write_folder("a", documents(1000))
    for size in (1999, 2001):
        os.truncate(folder / "shard_00000.bin", size)
        with pytest.raises(ValueError, match=rf"shard_00000\.bin has {size} bytes, but the manifest says 2000 bytes"):
            TokenSource(str(folder)).read_tokens(0, 1)


def test_a_shard_cut_short_while_in_use(write_folder: WriteFolder) -> None:
    """Through a memory map this would be a SIGBUS."""
    folder = write_folder("a", documents(100_000))
    source = TokenSource(str(folder))
    source.read_tokens(0, 100_000)
    os.truncate(folder / "shard_00000.bin", 150_000)
    with pytest.raises(ValueError, match=r"shard_00000\.bin has 150000 bytes, but the manifest says 200000 bytes"):
        source.read_tokens(74_990, 20)


def test_a_file_as_a_whole(write_folder: WriteFolder) -> None:
    folder = write_folder("a", documents(1000))
    source = TokenSource(str(folder))
    shard = source.manifest.shards[0]
    assert source.read_file("shard_00000.idx", shard.idx_xxh3) == (folder / "shard_00000.idx").read_bytes()
    with pytest.raises(ValueError, match=r"shard_00000\.idx is damaged"):
        source.read_file("shard_00000.idx", "0" * 16)


def test_sources_must_share_a_tokenizer(write_folder: WriteFolder) -> None:
    one, other = write_folder("one", documents(100)), write_folder("other", documents(100), vocab_size=1001)
    sources = (SourceConfig(name="a", path=str(one)), SourceConfig(name="b", path=str(other)))
    with pytest.raises(
        ValueError, match=rf"data folders {one} \(vocabulary 1000, .*{other} \(vocabulary 1001, .*same one"
    ):
        open_sources(sources, {})
    assert list(open_sources(sources[:1], {str(one): Manifest.load(one)})) == ["a"]


def test_ten_trillion_tokens_take_no_more_memory_than_their_names() -> None:
    """20,000 shards of 1 GB: what the folder is taken up with is small beside the manifest, and grows by use."""
    shards = tuple(
        ShardInfo(f"shard_{number:05d}", 500_000_000, 1, 10**9, 64, "0" * 16, "0" * 16) for number in range(20_000)
    )
    manifest = Manifest(
        vocab_size=60_000,
        bos_id=1,
        eos_id=2,
        tokenizer_fingerprint="",
        dtype="uint16",
        documents=20_000,
        tokens=10**13,
        text_bytes=1,
        quarantined=0,
        skipped_files=0,
        shards=shards,
    )
    tracemalloc.start()
    source = TokenSource("/nowhere", manifest)
    taken, peak = tracemalloc.get_traced_memory()
    assert taken < 0.5e6
    assert peak < 3e6
    with pytest.raises(ValueError, match=r"/nowhere/shard_19999\.xxh3 is missing"):
        source.read_tokens(10**13 - 1, 1)
    assert tracemalloc.get_traced_memory()[0] < 1e6
    tracemalloc.stop()
