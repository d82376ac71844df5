"""A rank's file: any reader opens it, no changed byte goes unnoticed, and no block is read twice."""

import errno
import json
import math
import os
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pretrain.boxes import Box
from pretrain.checkpoint import rank_file
from pretrain.checkpoint.index import DamagedError, StoredFile
from pretrain.checkpoint.rank_file import RankFile, tensor_key, write_rank_file
from tests.checkpoint_edit import flip_bit
from tests.unit.pretrain.checkpoint.made import SMALL_BLOCK, count_reads

pytestmark = pytest.mark.usefixtures("small_blocks")
REAL_BLOCK = rank_file.BLOCK_BYTES
Entries = list[tuple[str, tuple[int, ...]]]
ENTRIES: Entries = [("a", (5,)), ("b", (3, 7)), ("c", ()), ("d", (2, 3, 4)), ("e", (1,)), ("f", (24, 1))]
HASHES = "xxh3/blocks"

entries_of_files = st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), max_size=5).map(
    lambda shapes: [(str(number), shape) for number, shape in enumerate(shapes)]
)


def values_of(entries: Entries) -> list[Tensor]:
    """Values of which no two are alike."""
    numels = [math.prod(shape) for _, shape in entries]
    parts = torch.arange(sum(numels), dtype=torch.float32).add(0.25).split(numels)
    return [part.view(shape) for part, (_, shape) in zip(parts, entries, strict=True)]


def flat(entries: Entries) -> bytes:
    """All of a file's values."""
    return b"".join(value.numpy().tobytes() for value in values_of(entries))


def written(folder: Path, entries: Entries = ENTRIES) -> tuple[Path, StoredFile]:
    path = folder / "rank.safetensors"
    return path, write_rank_file(path, entries, values_of(entries))


def read_everything(path: Path, stored: StoredFile, entries: Entries, block_bytes: int = SMALL_BLOCK) -> None:
    """Open the file, and assert that every tensor is what was written."""
    file = RankFile(path, stored, block_bytes)
    try:
        for (key, shape), value in zip(entries, values_of(entries), strict=True):
            if shape:
                rows = [part.clone() for _, part in file.rows(key, shape, 0, shape[0])]
                assert torch.equal(torch.cat(rows), value)
            else:
                start = file.start_of(key, shape)
                assert bytes(file.read(start, start + 4)) == value.numpy().tobytes()
    finally:
        file.close()


def made_by_hand(
    path: Path, header: dict[str, Any] | bytes, values: bytes, block_bytes: int = SMALL_BLOCK
) -> StoredFile:
    """The format once more, in a few lines, and with any header: sealed, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    head = struct.pack("<Q", -(-len(text) // 8) * 8) + text.ljust(-(-len(text) // 8) * 8)
    hashes = b"".join(xxhash.xxh3_64_digest(values[at : at + block_bytes]) for at in range(0, len(values), block_bytes))
    path.write_bytes(head + values + hashes)
    return StoredFile(size_bytes=path.stat().st_size, xxh3=xxhash.xxh3_64_hexdigest(head + hashes))


def honest_header(entries: Entries, block_bytes: int = SMALL_BLOCK) -> dict[str, Any]:
    """What the header of these entries says."""
    header, at = {}, 0
    for key, shape in entries:
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 4 * math.prod(shape)]}
        at += 4 * math.prod(shape)
    blocks = -(-at // block_bytes)
    header[HASHES] = {"dtype": "U8", "shape": (blocks, 8), "data_offsets": [at, at + 8 * blocks]}
    return header


# Three of the files have tensors that begin in the middle of a block and end in the middle of another.
FILES: dict[str, Entries] = {
    "odd-sizes": ENTRIES,
    "nothing": [],
    "one-number": [("a", (1,))],
    "one-block": [("a", (16,))],
    "whole-blocks": [("a", (2, 16)), ("b", (16,))],
    "one-more": [("a", (17,)), ("fp32/layers.0.mlp.up.weight@0,3", (33, 3))],
}


@pytest.mark.parametrize("block_bytes", [SMALL_BLOCK, REAL_BLOCK])
@pytest.mark.parametrize("name", FILES)
def test_any_reader_opens_it(name: str, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_file, "BLOCK_BYTES", block_bytes)
    entries = FILES[name]
    path, stored = written(tmp_path, entries)
    assert path.stat().st_size == stored.size_bytes
    loaded = load_file(path)
    assert list(loaded.pop(HASHES).shape) == [-(-len(flat(entries)) // block_bytes), 8]
    assert loaded.keys() == dict(entries).keys()
    with safe_open(path, "pt") as opened:
        for (key, _), value in zip(entries, values_of(entries), strict=True):
            assert torch.equal(loaded[key], value)
            assert torch.equal(opened.get_tensor(key), value)
    read_everything(path, stored, entries, block_bytes)


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_what_its_description_says(name: str, tmp_path: Path) -> None:
    path, stored = written(tmp_path, FILES[name])
    by_hand = tmp_path / "by_hand"
    assert made_by_hand(by_hand, honest_header(FILES[name]), flat(FILES[name])) == stored
    assert by_hand.read_bytes() == path.read_bytes()


def test_blocks_of_the_real_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for name, value in (("BLOCK_BYTES", REAL_BLOCK), ("READ_BYTES", 16 << 20), ("_WRITE_BYTES", 300_000)):
        monkeypatch.setattr(rank_file, name, value)
    entries: Entries = [("a", (1000, 77)), ("b", (123_457,)), ("c", (65_537, 2))]
    path, stored = written(tmp_path, entries)
    read_everything(path, stored, entries, REAL_BLOCK)
    flip_bit(path, stored.size_bytes // 2)
    with pytest.raises(DamagedError, match=r"block 2 \(b\) fails its hash"):
        read_everything(path, stored, entries, REAL_BLOCK)


@settings(max_examples=25)
@given(entries_of_files, st.data())
def test_where_values_are_cut_does_not_change_the_file(
    tmp_path_factory: pytest.TempPathFactory, entries: Entries, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    path, stored = written(folder, entries)
    everything = torch.cat([value.flatten() for value in values_of(entries)]) if entries else torch.empty(0)
    cuts = data.draw(st.lists(st.integers(0, everything.numel()), max_size=6).map(sorted))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            rank_file, "_WRITE_BYTES", data.draw(st.sampled_from([4, 20, SMALL_BLOCK, 3 * SMALL_BLOCK, 1000]))
        )
        assert write_rank_file(folder / "again", entries, everything.tensor_split(cuts)) == stored
    assert (folder / "again").read_bytes() == path.read_bytes()


def test_values_may_lie_anywhere_in_memory(tmp_path: Path) -> None:
    value = torch.randn(6, 10)
    stored = write_rank_file(tmp_path / "a", [("a", (10, 6))], [value.T])
    assert write_rank_file(tmp_path / "b", [("a", (10, 6))], iter([value.T.contiguous()])) == stored


@pytest.mark.parametrize("values", [[torch.zeros(3)], [torch.zeros(5)], [torch.zeros(4, dtype=torch.bfloat16)]])
def test_values_that_are_not_the_entries_are_our_mistake(values: list[Tensor], tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_rank_file(tmp_path / "a", [("a", (4,))], values)


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    path, stored = written(tmp_path)
    read_everything(path, stored, ENTRIES)
    for at in range(stored.size_bytes):
        flip_bit(path, at, at % 8)
        with pytest.raises(DamagedError, match=str(path)) as caught:
            read_everything(path, stored, ENTRIES)
        assert "\n" not in str(caught.value)
        flip_bit(path, at, at % 8)
    read_everything(path, stored, ENTRIES)


def test_a_file_that_was_cut_is_found(tmp_path: Path) -> None:
    """At any length; and if that is also the length that the index gives, its hash still is not."""
    path, stored = written(tmp_path)
    for length in reversed(range(stored.size_bytes)):
        os.truncate(path, length)
        with pytest.raises(DamagedError, match=f"has {length} bytes, expected {stored.size_bytes} bytes"):
            RankFile(path, stored, SMALL_BLOCK)
        with pytest.raises(DamagedError, match="is damaged|ends before"):
            RankFile(path, StoredFile(size_bytes=length, xxh3=stored.xxh3), SMALL_BLOCK)
    path.unlink()
    with pytest.raises(DamagedError, match="is missing"):
        RankFile(path, stored, SMALL_BLOCK)


def test_a_file_that_is_cut_while_it_is_read_is_found(tmp_path: Path) -> None:
    path, stored = written(tmp_path)
    file = RankFile(path, stored, SMALL_BLOCK)
    os.truncate(path, stored.size_bytes // 2)
    with pytest.raises(DamagedError, match="ends before its"):
        file.read(0, file.value_bytes)
    file.close()


def test_another_block_size_is_not_believed(tmp_path: Path) -> None:
    path, stored = written(tmp_path)
    for block_bytes in (4, 60, 68, 2 * SMALL_BLOCK, REAL_BLOCK):
        with pytest.raises(DamagedError, match="does not match its hash|fails its hash"):
            read_everything(path, stored, ENTRIES, block_bytes)


def test_a_bad_block_is_named_by_its_first_tensor(tmp_path: Path) -> None:
    path, stored = written(tmp_path)
    start = stored.size_bytes - 8 * 5 - len(flat(ENTRIES))
    for byte, words in (
        (0, r"block 0 \(a\)"),
        (70, r"block 1 \(b\)"),
        (130, r"block 2 \(d\)"),
        (300, r"block 4 \(f\)"),
    ):
        flip_bit(path, start + byte)
        with pytest.raises(DamagedError, match=f"rank.safetensors is damaged: {words} fails its hash"):
            read_everything(path, stored, ENTRIES)
        flip_bit(path, start + byte)


def test_what_is_not_damaged_can_be_read_of_a_damaged_file(tmp_path: Path) -> None:
    path, stored = written(tmp_path)
    flip_bit(path, stored.size_bytes - 8 * 5 - len(flat(ENTRIES)) + 70)
    file = RankFile(path, stored, SMALL_BLOCK)
    everything = flat(ENTRIES)
    for start, stop in ((0, 64), (128, len(everything)), (20, 21), (150, 150)):
        assert bytes(file.read(start, stop)) == everything[start:stop]
        with pytest.raises(DamagedError, match="block 1"):
            file.read(start, 65) if start < 64 else file.read(127, stop)
    file.close()


def lies(**entry: Any) -> dict[str, Any]:
    """A header that is wrong in what it says of "a"."""
    header = honest_header([("a", (16,)), ("b", (3,))])
    return {**header, "a": {**header["a"], **entry}}


LIES: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "missing": ({HASHES: honest_header([("b", (19,))])[HASHES]}, r"does not hold a of shape \[16\], as the index says"),
    "dtype": (lies(dtype="I32"), r"does not hold a of shape \[16\]"),
    "shape": (lies(shape=[4, 4]), r"does not hold a of shape \[16\]"),
    "beyond": (lies(data_offsets=[16, 80]), "a lies outside of its values"),
    "far-beyond": (lies(data_offsets=[10**18, 10**18 + 64]), "a lies outside of its values"),
    "negative": (lies(data_offsets=[-4, 60]), "a lies outside of its values"),
    "backwards": (lies(data_offsets=[64, 0]), "a lies outside of its values"),
    "short": (lies(data_offsets=[0, 60]), "a lies outside of its values"),
    "offsets": (lies(data_offsets=[0]), "has no safetensors header"),
    "no-json": (b'{"a": ', "has no safetensors header"),
    "nothing": (b"", "has no safetensors header"),
    "list": (b"[]", "has no safetensors header"),
    "no-text": (b"\xff\xfe{}", "has no safetensors header"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_header_is_not_believed_for_its_hash(case: str, tmp_path: Path) -> None:
    header, words = LIES[case]
    path = tmp_path / "rank.safetensors"
    stored = made_by_hand(path, header, flat([("a", (16,)), ("b", (3,))]))
    with pytest.raises(DamagedError, match=words) as caught:
        list(RankFile(path, stored, SMALL_BLOCK).rows("a", (16,), 0, 16))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=25)
@given(entries_of_files, st.data())
def test_any_range_is_the_plain_bytes(
    tmp_path_factory: pytest.TempPathFactory, entries: Entries, data: st.DataObject
) -> None:
    path, stored = written(tmp_path_factory.mktemp("range"), entries)
    everything = flat(entries)
    file = RankFile(path, stored, SMALL_BLOCK)
    assert file.value_bytes == len(everything)
    places = st.integers(0, len(everything))
    for start, stop in data.draw(st.lists(st.tuples(places, places).map(sorted), max_size=8)):
        assert bytes(file.read(start, stop)) == everything[start:stop]
    file.close()


@pytest.mark.parametrize(("first", "last"), [(0, 8), (2, 3), (3, 8), (4, 4)])
@pytest.mark.parametrize("row", [1, 3, 40])
def test_rows_come_in_parts_that_say_where_they_begin(row: int, first: int, last: int, tmp_path: Path) -> None:
    """40 numbers are more than one read is to take: a row is never cut."""
    entries: Entries = [("before", (3,)), ("a", (8, row)), ("after", (5,))]
    path, stored = written(tmp_path, entries)
    file = RankFile(path, stored, SMALL_BLOCK)
    parts = [(start, rows.clone()) for start, rows in file.rows("a", (8, row), first, last)]
    file.close()
    assert [len(rows) for _, rows in parts[:-1]] == [max(1, 100 // (4 * row))] * (len(parts) - 1)
    expected = values_of(entries)[1]
    for start, rows in parts:
        assert torch.equal(rows, expected[start : start + len(rows)])
    assert [number for start, rows in parts for number in range(start, start + len(rows))] == list(range(first, last))


def test_reading_onwards_reads_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, stored = written(tmp_path)
    counts = count_reads(monkeypatch)
    read_everything(path, stored, ENTRIES)
    assert sum(counts) == stored.size_bytes + 8  # the header's length is read once more with the header


@settings(max_examples=25)
@given(st.data())
def test_reading_onwards_with_gaps_reads_only_the_blocks_it_needs(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    entries: Entries = [("a", (100,)), ("b", (57,))]
    path, stored = written(tmp_path_factory.mktemp("gaps"), entries)
    file = RankFile(path, stored, SMALL_BLOCK)
    places = data.draw(st.lists(st.integers(0, file.value_bytes), min_size=2, max_size=12).map(sorted))
    needed: set[int] = set()
    with pytest.MonkeyPatch.context() as patch:
        counts = count_reads(patch)
        for start, stop in zip(places[::2], places[1::2], strict=False):
            file.read(start, stop)
            needed |= set(range(start // SMALL_BLOCK, -(-stop // SMALL_BLOCK))) if start < stop else set()
    file.close()
    assert sum(counts) == sum(min(SMALL_BLOCK, file.value_bytes - block * SMALL_BLOCK) for block in needed)


def test_a_file_holds_no_more_than_a_block_after_it_was_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds are open at a time while ranks of another layout load."""
    monkeypatch.setattr(rank_file, "READ_BYTES", 1 << 20)
    entries: Entries = [("a", (1 << 19,))]
    path, stored = written(tmp_path, entries)
    tracemalloc.start()
    try:
        file = RankFile(path, stored, SMALL_BLOCK)
        opened = tracemalloc.get_traced_memory()[0]
        assert sum(len(rows) for _, rows in file.rows("a", (1 << 19,), 0, 1 << 19)) == 1 << 19
        assert tracemalloc.get_traced_memory()[0] > opened + (1 << 20)
        file.release()
        assert tracemalloc.get_traced_memory()[0] < opened + 10_000
        assert len(file.read(3, 200)) == 197
        file.close()
    finally:
        tracemalloc.stop()


def test_a_file_holds_no_handle_after_it_was_refused(tmp_path: Path) -> None:
    path, stored = written(tmp_path)
    flip_bit(path, -1)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(DamagedError):
        RankFile(path, stored, SMALL_BLOCK)
    assert os.listdir("/proc/self/fd") == before


def test_a_write_that_fails_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "rank.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        write_rank_file(path, ENTRIES, values_of(ENTRIES))
    assert caught.value.filename == str(path)


def test_a_full_disk_names_the_file(small_disk: Path) -> None:
    path = small_disk / "rank.safetensors"
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_rank_file(path, [("a", (1 << 19,))], [torch.zeros(1 << 19)])
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))


def test_values_that_cannot_be_had_name_their_own_file(tmp_path: Path) -> None:
    def values() -> Iterator[Tensor]:
        yield torch.zeros(2)
        (tmp_path / "source").read_bytes()

    with pytest.raises(FileNotFoundError) as caught:
        write_rank_file(tmp_path / "rank.safetensors", [("a", (4,))], values())
    assert caught.value.filename == str(tmp_path / "source")


def test_keys_say_kind_name_and_place() -> None:
    assert tensor_key("exp_avg", "layers.0.attention.q.weight", Box((4, 0), (2, 8))) == (
        "exp_avg/layers.0.attention.q.weight@4,0"
    )
