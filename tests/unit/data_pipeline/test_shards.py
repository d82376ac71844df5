import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.origins import ORIGIN_DTYPE
from data_pipeline.shards import HASH_BLOCK_BYTES, ShardWriter, read_index, token_dtype, write_atomically

U2 = np.dtype("<u2")


def write(folder: Path, documents: list[list[int]], dtype: np.dtype = U2, shard_bytes: int = 1 << 30) -> ShardWriter:
    with ShardWriter(folder, dtype, shard_bytes) as writer:
        tokens = np.array([token for document in documents for token in document], dtype=dtype)
        writer.append(tokens, np.array([len(document) for document in documents], dtype=np.int64))
    return writer


@pytest.mark.parametrize(("vocab_size", "code", "itemsize"), [(65_536, 8, 2), (65_537, 4, 4)])
def test_the_format_is_megatrons(tmp_path: Path, vocab_size: int, code: int, itemsize: int) -> None:
    """Byte by byte what Megatron-LM's IndexedDataset reads: header, lengths, pointers, document indices."""
    documents = [[1, 5, 6, 2], [1, 2], [1, vocab_size - 1, 2]]
    dtype = token_dtype(vocab_size)
    assert dtype.itemsize == itemsize
    write(tmp_path, documents, dtype)
    content = (tmp_path / "shard_00000.idx").read_bytes()
    assert content[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<QBQQ", content, 9) == (1, code, 3, 4)
    assert struct.unpack_from("<3i", content, 34) == (4, 2, 3)
    assert struct.unpack_from("<3q", content, 46) == (0, 4 * itemsize, 6 * itemsize)
    assert struct.unpack_from("<4q", content, 70) == (0, 1, 2, 3)
    assert len(content) == 102
    tokens = np.fromfile(tmp_path / "shard_00000.bin", dtype=dtype)
    assert tokens.tolist() == [token for document in documents for token in document]


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60), cuts=st.lists(st.integers(0, 60), max_size=5))
def test_shards_do_not_depend_on_how_documents_arrive(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], cuts: list[int]
) -> None:
    shard_tokens = 50
    tokens = np.arange(sum(lengths), dtype=U2)
    ends = np.cumsum([0, *lengths])
    whole, parts = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("parts")
    with ShardWriter(whole, U2, 2 * shard_tokens) as writer:
        writer.append(tokens, np.array(lengths))
    with ShardWriter(parts, U2, 2 * shard_tokens) as in_parts:
        places = sorted({0, len(lengths), *(min(cut, len(lengths)) for cut in cuts)})
        for a, b in itertools.pairwise(places):
            in_parts.append(tokens[ends[a] : ends[b]], np.array(lengths[a:b]))
    assert writer.shards == in_parts.shards
    for path in whole.iterdir():
        assert path.read_bytes() == (parts / path.name).read_bytes()
    assert sum(shard.documents for shard in writer.shards) == len(lengths)
    read = np.concatenate([np.fromfile(whole / f"{shard.name}.bin", dtype=U2) for shard in writer.shards])
    assert np.array_equal(read, tokens)
    for shard, following in itertools.pairwise(writer.shards):
        assert shard.tokens <= shard_tokens
        first_of_next = read_index(whole / f"{following.name}.idx")[0][0]
        assert shard.tokens + first_of_next > shard_tokens


def test_a_document_longer_than_a_shard_has_one_to_itself(tmp_path: Path) -> None:
    writer = write(tmp_path, [[1, 2], list(range(100)), [3, 4]], shard_bytes=20)
    assert [shard.tokens for shard in writer.shards] == [2, 100, 2]


@pytest.mark.parametrize("tokens", [1, HASH_BLOCK_BYTES // 2, HASH_BLOCK_BYTES // 2 + 1, 5_000_000])
def test_hashes_of_every_block(tmp_path: Path, tokens: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << 16, tokens).astype(U2)
    with ShardWriter(tmp_path, U2) as writer:
        for start in range(0, tokens, 1_000_003):
            part = values[start : start + 1_000_003]
            writer.append(part, np.array([len(part)]))
    content = (tmp_path / "shard_00000.bin").read_bytes()
    assert content == values.tobytes()
    blocks = [content[i : i + HASH_BLOCK_BYTES] for i in range(0, len(content), HASH_BLOCK_BYTES)]
    sidecar = (tmp_path / "shard_00000.xxh3").read_bytes()
    assert sidecar == b"".join(struct.pack("<Q", xxhash.xxh3_64_intdigest(block)) for block in blocks)
    assert writer.shards[0].blocks == len(blocks)
    assert writer.shards[0].hashes_xxh3 == xxhash.xxh3_64_hexdigest(sidecar)
    assert writer.shards[0].file_sizes() == {path.name: path.stat().st_size for path in tmp_path.iterdir()}


def test_an_error_leaves_no_temporary_file(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path, U2) as writer:
            writer.append(np.array([1, 2], dtype=U2), np.array([2]))
            assert [path.name for path in tmp_path.iterdir()] == ["shard_00000.bin.tmp"]
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_document_that_is_longer_than_an_index_can_say_is_refused(tmp_path: Path) -> None:
    tokens = np.broadcast_to(np.zeros(1, dtype=U2), 1 << 31)  # takes no memory
    with ShardWriter(tmp_path, U2) as writer, pytest.raises(ValueError, match="2,147,483,648 tokens.*split it"):
        writer.append(tokens, np.array([len(tokens)]))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_passes_through(tmp_path: Path) -> None:
    (tmp_path / "m.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "m.json", b"{}")
    assert not list(tmp_path.iterdir())


def test_no_index(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2]])
    path = tmp_path / "shard_00000.idx"
    content = path.read_bytes()
    for damaged in (content[:-1], b"X" + content[1:], b"", content[:20]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a Megatron index"):
            read_index(path)


def test_origins_go_with_their_documents(tmp_path: Path) -> None:
    origins = np.array([(i, i // 3, 10 * i) for i in range(10)], dtype=ORIGIN_DTYPE)
    lengths = np.full(10, 4)
    with ShardWriter(tmp_path, U2, shard_bytes=30) as writer:
        for part in (slice(0, 7), slice(7, 10)):
            writer.append(np.zeros(lengths[part].sum(), dtype=U2), lengths[part], origins[part])
    assert [shard.documents for shard in writer.shards] == [3, 3, 3, 1]
    contents = [(tmp_path / f"{shard.name}.origin").read_bytes() for shard in writer.shards]
    assert b"".join(contents) == origins.tobytes()
    assert [shard.origin_xxh3 for shard in writer.shards] == [xxhash.xxh3_64_hexdigest(one) for one in contents]
    sizes = {name: size for shard in writer.shards for name, size in shard.file_sizes().items()}
    assert sizes == {path.name: path.stat().st_size for path in tmp_path.iterdir()}
