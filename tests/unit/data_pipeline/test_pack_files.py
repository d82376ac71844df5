import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.manifest import Manifest
from data_pipeline.pack_files import KEPT_SHARDS, PackedSamples, find_pack, pack_shard, plan_packing
from data_pipeline.shards import DTYPE_CODES, INDEX_HEADER, INDEX_MAGIC, INDEX_VERSION, ShardInfo
from data_pipeline.token_source import TokenSource
from tests.unit.data_pipeline.conftest import WriteFolder
from tests.unit.data_pipeline.ordered_sources import tokens_of
from tests.unit.data_pipeline.test_verify import flip

T = 8
BLOCK_BYTES = 80
"""40 tokens."""


def documents(seed: int = 0, count: int = 100) -> list[list[int]]:
    lengths = np.random.default_rng(seed).geometric(0.15, count).tolist()
    return [[1, *range(3, 3 + length), 2] for length in lengths]


def opened(folder: Path, T: int = T) -> PackedSamples:
    source = TokenSource(str(folder))
    return PackedSamples(source.manifest, find_pack(source.manifest, str(folder), T), source.read_file)


@pytest.mark.parametrize("shard_bytes", [1 << 20, 300, 60])
def test_a_pack_is_every_token_once_by_block(write_folder: WriteFolder, shard_bytes: int) -> None:
    stored = documents()
    folder = write_folder("a", stored, shard_bytes=shard_bytes)
    told: list[tuple[int, int]] = []
    info = plan_packing(folder, T, BLOCK_BYTES, lambda done, total: told.append((done, total)))
    manifest = Manifest.load(folder)
    assert manifest.packs == (info,)
    assert told[-1] == (manifest.tokens, manifest.tokens)
    assert len(told) == len(manifest.shards)
    samples = opened(folder)
    assert samples.sequence_length == T
    assert samples.block_samples.sum() == info.samples
    extents = samples.extents(np.arange(info.samples))
    assert sorted(tokens_of(extents).tolist()) == list(range(manifest.tokens))
    assert (extents.tokens <= T).all()
    assert info.tokens == manifest.tokens == samples.block_tokens.sum()
    assert info.padding_tokens == info.samples * T - info.tokens
    assert info.cut_documents == sum(len(document) > T for document in stored)

    # Each sample's documents begin in the block that the sample is of.
    ends = np.cumsum([len(document) for document in stored])
    begins = ends - [len(document) for document in stored]
    shard_starts = np.cumsum([0] + [shard.tokens for shard in manifest.shards])
    first_block = np.cumsum([0] + [-(-shard.tokens // 40) for shard in manifest.shards])
    begin_of = begins[np.searchsorted(begins, extents.start, side="right") - 1]
    shard_of = np.searchsorted(shard_starts, begin_of, side="right") - 1
    block_of = first_block[shard_of] + (begin_of - shard_starts[shard_of]) // 40
    expected = np.repeat(np.repeat(np.arange(first_block[-1]), samples.block_samples), np.diff(extents.first))
    assert np.array_equal(block_of, expected)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False))
def test_samples_come_as_they_are_asked_for(samples_of_shards: PackedSamples, random) -> None:  # type: ignore[no-untyped-def]
    total = int(samples_of_shards.block_samples.sum())
    everything = samples_of_shards.extents(np.arange(total))
    numbers = np.array(random.choices(range(total), k=random.randrange(30)), dtype=np.int64)
    got, expected = samples_of_shards.extents(numbers), everything.take(numbers)
    for name in ("first", "start", "count"):
        assert np.array_equal(getattr(got, name), getattr(expected, name))
        assert getattr(got, name).dtype == np.int64


@pytest.fixture
def samples_of_shards(write_folder: WriteFolder) -> PackedSamples:
    folder = write_folder("a", documents(), shard_bytes=300)
    plan_packing(folder, T, BLOCK_BYTES)
    return opened(folder)


def test_opening_reads_one_file_and_samples_those_of_their_shards(write_folder: WriteFolder) -> None:
    folder = write_folder("a", documents(count=140), shard_bytes=100)
    info = plan_packing(folder, T, BLOCK_BYTES)
    source = TokenSource(str(folder))
    assert len(source.manifest.shards) > KEPT_SHARDS
    read: Counter[str] = Counter()

    def read_file(name: str, xxh3: str) -> bytes:
        read[name] += 1
        return source.read_file(name, xxh3)

    samples = PackedSamples(source.manifest, info, read_file)
    assert read == {"pack8.blocks": 1}
    for _ in range(3):
        samples.extents(np.array([info.samples - 1, 0, 1]))
    last = source.manifest.shards[-1].name
    assert read == {"pack8.blocks": 1, "shard_00000.pack8": 1, f"{last}.pack8": 1}
    samples.extents(np.arange(info.samples))
    samples.extents(np.array([0]))
    assert read["shard_00000.pack8"] == 2  # memory is bounded


def test_a_pack_is_the_same_each_time_and_lies_beside_others(write_folder: WriteFolder) -> None:
    one, other = write_folder("one", documents(), shard_bytes=300), write_folder("other", documents(), shard_bytes=300)
    plan_packing(one, 16, BLOCK_BYTES)
    plan_packing(one, T, 60)
    plan_packing(one, T, BLOCK_BYTES)
    plan_packing(other, T, BLOCK_BYTES)
    plan_packing(other, 16, BLOCK_BYTES)
    assert Manifest.load(one) == Manifest.load(other)
    assert [pack.sequence_length for pack in Manifest.load(one).packs] == [8, 16]
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, other)]
    assert files[0] == files[1]
    assert np.array_equal(opened(one, 8).block_tokens, opened(one, 16).block_tokens)


def test_a_unit_of_work_is_a_shard(write_folder: WriteFolder) -> None:
    """Its file follows from its index alone, whatever the shard is called by then."""
    folder = write_folder("a", documents(), shard_bytes=300)
    info = plan_packing(folder, T, BLOCK_BYTES)
    shards = Manifest.load(folder).shards
    for path in folder.glob("*.bin"):
        path.unlink()
    packed = [pack_shard(folder, shard, T, info.block_tokens) for shard in reversed(shards)]
    assert tuple(of.xxh3 for of in reversed(packed)) == info.shard_xxh3


def test_shards_of_more_tokens_than_32_bits_count(tmp_path: Path) -> None:
    longest, T = (1 << 31) - 1, 1 << 20
    lengths = np.array([longest, 5, longest, 7, longest, 9], dtype="<i4")
    count = len(lengths)
    header = INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, DTYPE_CODES["uint16"], count, count + 1)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    index = header + lengths.tobytes() + (2 * starts).astype("<i8").tobytes() + np.arange(count + 1).tobytes()
    (tmp_path / "huge.idx").write_bytes(index)
    tokens = int(lengths.sum(dtype=np.int64))
    shard = ShardInfo("huge", tokens, count, 2 * tokens, len(index), xxhash.xxh3_64_hexdigest(index), "")
    packed = pack_shard(tmp_path, shard, T, 1 << 25)
    assert sum(packed.block_tokens) == tokens
    content = (tmp_path / f"huge.pack{T}").read_bytes()
    samples = sum(packed.block_samples)
    start, length = np.frombuffer(content[4 * (samples + 1) :], dtype="<i8").reshape(2, -1)
    in_order = np.argsort(start)
    assert np.array_equal(start[in_order], np.cumsum(length[in_order]) - length[in_order])
    assert length.sum() == tokens
    assert set(starts.tolist()) <= set(start.tolist())


@pytest.mark.parametrize("name", ["shard_00001.pack8", "pack8.blocks"])
def test_damage_is_found_before_a_sample_is_used(write_folder: WriteFolder, name: str) -> None:
    folder = write_folder("a", documents(), shard_bytes=300)
    info = plan_packing(folder, T, BLOCK_BYTES)
    content = (folder / name).read_bytes()
    flip(folder / name, 9)
    with pytest.raises(ValueError, match=rf"{name} is damaged: run `steppe data verify"):
        opened(folder).extents(np.arange(info.samples))
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        opened(folder).extents(np.arange(info.samples))
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        opened(folder).extents(np.arange(info.samples))


def test_a_length_that_is_not_packed_for(write_folder: WriteFolder) -> None:
    folder = write_folder("a", documents())
    with pytest.raises(ValueError, match=r"not packed for sequence length 8 \(it is for: none\).*--pack 8`"):
        opened(folder)
    plan_packing(folder, T, BLOCK_BYTES)
    plan_packing(folder, 12, BLOCK_BYTES)
    with pytest.raises(ValueError, match=r"not packed for sequence length 9 \(it is for: 8, 12\)"):
        opened(folder, 9)


def test_what_cannot_be_packed(write_folder: WriteFolder) -> None:
    folder = write_folder("a", documents())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="a shuffle block of 40 tokens is shorter than the sequence length 41"):
        plan_packing(folder, 41, BLOCK_BYTES)
    with pytest.raises(ValueError, match="sequence length of 0 was to be packed for"):
        plan_packing(folder, 0, BLOCK_BYTES)
    with pytest.raises(ValueError, match="does not exist"):
        plan_packing(folder / "nowhere", T, BLOCK_BYTES)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    flip(folder / "shard_00000.idx", 60)
    with pytest.raises(ValueError, match=r"shard_00000\.idx is damaged"):
        plan_packing(folder, T, BLOCK_BYTES)


def test_documents_longer_than_a_block(write_folder: WriteFolder) -> None:
    """The blocks that one covers hold no sample."""
    stored = [[1, *range(3, 200), 2], [1, 3, 2], [1, *range(3, 100), 2]]
    folder = write_folder("a", stored)
    info = plan_packing(folder, T, BLOCK_BYTES)
    samples = opened(folder)
    assert (samples.block_samples[:4] > 0).tolist() == [True, False, False, False]
    extents = samples.extents(np.arange(info.samples))
    assert sorted(tokens_of(extents).tolist()) == list(range(sum(map(len, stored))))
    rows = [extents.start[a:b].tolist() for a, b in itertools.pairwise(extents.first.tolist())]
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
