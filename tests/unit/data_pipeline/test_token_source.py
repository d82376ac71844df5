import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.shards import HASH_BLOCK_BYTES
from data_pipeline.token_source import TokenSource, open_sources
from tests.unit.data_pipeline.conftest import WriteFolder
from tests.unit.data_pipeline.test_verify import flip

T = 16


def open_source(folder: Path, sequence_length: int = T) -> TokenSource:
    return TokenSource(SourceConfig(name="a", path=str(folder)), sequence_length)


def documents(tokens: int, length: int = 100) -> list[list[int]]:
    values = np.random.default_rng(0).integers(3, 1000, tokens).tolist()
    return [values[i : i + length] for i in range(0, tokens, length)]


def read(source: TokenSource, windows: list[int], sequence_length: int = T) -> np.ndarray:
    out = np.empty((len(windows), sequence_length + 1), dtype="<u2")
    source.read(np.array(windows), out)
    return out


@pytest.mark.parametrize("shard_bytes", [1 << 20, 400, 60])
def test_windows_overlap_by_one_and_cross_shards(write_folder: WriteFolder, shard_bytes: int) -> None:
    stored = documents(1000, length=7)
    source = open_source(write_folder("a", stored, shard_bytes=shard_bytes))
    tokens = np.concatenate(stored)
    assert source.windows == 999 // T
    got = read(source, list(range(source.windows)))
    assert np.array_equal(got, [tokens[w * T : w * T + T + 1] for w in range(source.windows)])
    assert np.array_equal(read(source, [5, 0, 5, 61]), got[[5, 0, 5, 61]])
    assert np.array_equal(source.read_tokens(3, 600), tokens[3:603])
    source.close()
    assert np.array_equal(read(source, [1]), got[[1]])  # opens again what it needs


@pytest.mark.parametrize(("tokens", "windows"), [(1, 0), (16, 0), (17, 1), (32, 1), (33, 2), (1000, 62)])
def test_the_number_of_windows(write_folder: WriteFolder, tokens: int, windows: int) -> None:
    """A window needs the token after it as its last target."""
    assert open_source(write_folder("a", documents(tokens))).windows == windows


def test_many_shards_need_few_open_files(write_folder: WriteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.token_source.OPEN_SHARDS", 3)
    source = open_source(write_folder("a", documents(4000), shard_bytes=400))
    before = len(os.listdir("/proc/self/fd"))
    read(source, list(range(source.windows)))
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_damaged_block_is_found_where_it_is_touched(write_folder: WriteFolder) -> None:
    folder = write_folder("a", documents(100_000), shard_bytes=1 << 17)
    flip(folder / "shard_00001.bin", HASH_BLOCK_BYTES + 77)
    source = open_source(folder)
    shard_tokens = 65_500
    damaged_tokens = shard_tokens + HASH_BLOCK_BYTES // 2
    assert len(read(source, [0, (damaged_tokens - 20) // T - 1])) == 2
    with pytest.raises(
        ValueError, match=r"shard .*shard_00001\.bin is damaged in block 1 \(bytes 65536 to .*steppe data verify"
    ):
        read(source, [damaged_tokens // T + 1])
    # Also by a window that only reaches into the block.
    with pytest.raises(ValueError, match="damaged in block 1"):
        source.read_tokens(damaged_tokens - 1, 2)


def test_damaged_hashes_are_found(write_folder: WriteFolder) -> None:
    folder = write_folder("a", documents(1000))
    flip(folder / "shard_00000.xxh3", 3)
    with pytest.raises(ValueError, match=r"shard_00000\.xxh3 is damaged"):
        read(open_source(folder), [0])


def test_a_shard_cut_short_while_in_use(write_folder: WriteFolder) -> None:
    """Through a memory map this would be a SIGBUS."""
    folder = write_folder("a", documents(100_000))
    source = open_source(folder)
    last = source.windows - 1
    assert len(read(source, [0, last])) == 2
    os.truncate(folder / "shard_00000.bin", 150_000)
    with pytest.raises(ValueError, match=r"shard_00000\.bin ends at byte 150000, but the manifest says 200000 bytes"):
        read(source, [74_990 // T])


def test_sources_must_share_a_tokenizer(write_folder: WriteFolder) -> None:
    one, other = write_folder("one", documents(100)), write_folder("other", documents(100), vocab_size=1001)
    sources = (SourceConfig(name="a", path=str(one)), SourceConfig(name="b", path=str(other)))
    with pytest.raises(
        ValueError, match=rf"data folders {one} \(vocabulary 1000, .*{other} \(vocabulary 1001, .*same one"
    ):
        open_sources(sources, T, {})
    assert list(open_sources(sources[:1], T, {})) == ["a"]
