import os
from pathlib import Path

import pytest

from data_pipeline.pack_files import plan_packing
from data_pipeline.shards import HASH_BLOCK_BYTES
from data_pipeline.verify import verify
from tests.unit.data_pipeline.conftest import WriteFolder
from tests.unit.data_pipeline.servers import file_server

DOCUMENTS = [[1, *([7] * 50_000), 2]] * 4


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def test_a_whole_folder(write_folder: WriteFolder) -> None:
    folder = write_folder("a", DOCUMENTS, shard_bytes=210_000)
    seen: list[tuple[int, int]] = []
    report = verify(folder, lambda done, total: seen.append((done, total)))
    assert (report.shards, report.blocks, report.documents, report.tokens) == (2, 8, 4, 200_008)
    assert seen[-1] == (400_016, 400_016)


@pytest.mark.parametrize("block", [0, 3])
def test_a_flipped_bit_names_shard_and_block(write_folder: WriteFolder, block: int) -> None:
    folder = write_folder("a", DOCUMENTS, shard_bytes=210_000)
    flip(folder / "shard_00001.bin", block * HASH_BLOCK_BYTES + 5)
    with pytest.raises(
        ValueError, match=rf"damaged: shard shard_00001\.bin, block {block} \(from byte {block * 65536}\)"
    ):
        verify(folder)


def test_much_damage_is_counted(write_folder: WriteFolder) -> None:
    folder = write_folder("a", DOCUMENTS, shard_bytes=210_000)
    for block in (0, 1, 2):
        for shard in (0, 1):
            flip(folder / f"shard_{shard:05d}.bin", block * HASH_BLOCK_BYTES)
    with pytest.raises(ValueError, match=r"block 0 .*; and 2 more"):
        verify(folder)


@pytest.mark.parametrize("name", ["shard_00000.idx", "shard_00000.xxh3", "tokenizer.model"])
def test_damage_beside_the_tokens(write_folder: WriteFolder, name: str) -> None:
    folder = write_folder("a", DOCUMENTS)
    flip(folder / name, 50 if name.endswith("idx") else 5)
    with pytest.raises(ValueError, match=name):
        verify(folder)


def test_damage_of_a_pack(write_folder: WriteFolder) -> None:
    folder = write_folder("a", DOCUMENTS, shard_bytes=210_000)
    pack = plan_packing(folder, 1000)
    verify(folder)
    for name in ("pack1000.blocks", "shard_00001.pack1000"):
        flip(folder / name, 5)
        with pytest.raises(ValueError, match=f"damaged: {name} does not match its hash: copy it again"):
            verify(folder)
        flip(folder / name, 5)
    (folder / pack.blocks_name).unlink()
    with pytest.raises(ValueError, match=r"damaged: pack1000.blocks is missing"):
        verify(folder)


@pytest.mark.parametrize("suffix", ["bin", "idx", "xxh3"])
def test_a_missing_file(write_folder: WriteFolder, suffix: str) -> None:
    folder = write_folder("a", DOCUMENTS)
    (folder / f"shard_00000.{suffix}").unlink()
    with pytest.raises(ValueError, match=rf"^data folder {folder} is damaged: shard_00000\.{suffix} is missing: copy"):
        verify(folder)


@pytest.mark.parametrize("change", [-2, 2])
def test_a_shard_of_another_size(write_folder: WriteFolder, change: int) -> None:
    folder = write_folder("a", DOCUMENTS)
    os.truncate(folder / "shard_00000.bin", 400_016 + change)
    with pytest.raises(ValueError, match=rf"has {400_016 + change} bytes, but the manifest says 400016 bytes"):
        verify(folder)


def test_a_folder_on_a_server(write_folder: WriteFolder) -> None:
    folder = write_folder("a", DOCUMENTS, shard_bytes=210_000)
    with file_server(folder.parent) as server:
        assert verify(f"{server.url}/a") == verify(folder)
        flip(folder / "shard_00001.bin", 2 * HASH_BLOCK_BYTES)
        with pytest.raises(
            ValueError, match=rf"^data folder {server.url}/a is damaged: shard shard_00001\.bin, block 2"
        ):
            verify(f"{server.url}/a")
