"""What the start of a run asks of the file system, of each of 1,024 ranks: it does not grow with the data folder."""

import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.config import DataConfig, Packing, SourceConfig
from data_pipeline.loader import Loader
from data_pipeline.manifest import Manifest
from data_pipeline.order import Stage
from data_pipeline.pack_files import plan_packing
from data_pipeline.run_order import open_order
from data_pipeline.shards import HASH_BLOCK_BYTES
from data_pipeline.token_source import TokenSource, open_sources
from tests.unit.data_pipeline.conftest import WriteFolder

RANKS = 1024
SHARE = 2
"""Samples of a rank in a global batch."""
T = 32
SHARDS, SHARD_TOKENS, BLOCK_TOKENS, GROUP_BLOCKS = 40, 5000, 2500, 4
ALWAYS = [Stage(0, {"a": 1.0}, T)]


@dataclass
class Calls:
    """What this process asks the file system for below a folder, while it is listened to."""

    folder: Path
    opened: Counter[str] = field(default_factory=Counter)
    """Names of files."""
    looked: int = 0
    """Calls of `stat` and its kin, and listings."""
    read_bytes: int = 0
    listening: bool = False

    def hears_of(self, path: object) -> bool:
        return self.listening and isinstance(path, str | Path) and Path(path).is_relative_to(self.folder)

    def begin(self) -> None:
        self.opened, self.looked, self.read_bytes, self.listening = Counter(), 0, 0, True


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    calls = Calls(tmp_path)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and calls.hears_of(arguments[0]):
            if event == "open":
                calls.opened[Path(arguments[0]).name] += 1
            else:
                calls.looked += 1

    sys.addaudithook(hear)  # for good: there is no way to take it away
    for name in ("stat", "lstat", "access"):

        def look(path: Any, *arguments: Any, true: Any = getattr(os, name), **options: Any) -> Any:
            calls.looked += calls.hears_of(path)
            return true(path, *arguments, **options)

        monkeypatch.setattr(os, name, look)

    def preadv(descriptor: int, buffers: Any, offset: int, true: Any = os.preadv) -> int:
        count: int = true(descriptor, buffers, offset)
        calls.read_bytes += count if calls.listening else 0
        return count

    def read_bytes(path: Path, true: Any = Path.read_bytes) -> bytes:
        content: bytes = true(path)
        calls.read_bytes += len(content) if calls.hears_of(path) else 0
        return content

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    yield calls
    calls.listening = False


@pytest.fixture
def folder(write_folder: WriteFolder) -> Path:
    values = np.random.default_rng(0).integers(3, 1000, SHARDS * SHARD_TOKENS).tolist()
    documents = [values[i : i + 20] for i in range(0, len(values), 20)]
    folder = write_folder("a", documents, shard_bytes=2 * SHARD_TOKENS)
    for sequence_length in (T, 2 * T):
        plan_packing(folder, sequence_length, 2 * BLOCK_TOKENS)
    return folder


class Start:
    """A run that begins, on a manifest that one rank has read and sent to the others."""

    def __init__(self, folder: Path, packing: Packing, calls: Calls, stages: list[Stage]) -> None:
        self.folder, self.calls, self.stages = folder, calls, stages
        self.data = DataConfig(
            sequence_length=T,
            sources=(SourceConfig(name="a", path=str(folder)),),
            packing=packing,
            shuffle_block_bytes=2 * BLOCK_TOKENS,
            shuffle_group_blocks=GROUP_BLOCKS,
        )
        self.manifest = Manifest.load(folder)
        self.order = open_order(self.data, 0, stages, open_sources(self.data.sources, {}))

    def of_rank(self, rank: int) -> Calls:
        """What a rank asks for until it has its share of the first global batch, of a run that then goes on."""
        begun = threading.Event()
        in_time = []

        def plan() -> Iterator[tuple[int, int]]:
            yield 0, RANKS * SHARE
            in_time.append(begun.wait(10))

        self.calls.begin()
        manifests = {str(self.folder): self.manifest}
        loader = Loader(self.data, 0, self.stages, rank, RANKS, SHARE, False, plan(), manifests)
        assert len(next(loader)) == 1
        self.calls.listening = False
        begun.set()
        loader.close()
        assert in_time == [True], "the first batch waits for nothing that comes after it"
        return self.calls

    def touched(self, rank: int) -> tuple[set[str], set[str], int]:
        """Names of the shards that hold a rank's first samples, and with their last targets; tokens of these."""
        picked = self.order.samples(rank * SHARE + np.arange(SHARE))
        extents = self.order.extents(0, 0, picked.number)
        end = np.minimum(extents.start + extents.count + 1, self.manifest.tokens)
        holds = _names(extents.start)
        return holds, holds | _names(end - 1), int((end - extents.start).sum())


def _names(tokens: np.ndarray) -> set[str]:
    """Of the shards that hold these."""
    return {f"shard_{shard:05d}" for shard in (tokens // SHARD_TOKENS).tolist()}


def test_a_manifest_is_one_file(folder: Path, calls: Calls) -> None:
    """It says where the shards are: nobody lists the folder or looks at a shard."""
    calls.begin()
    manifest = Manifest.load(folder)
    assert len(manifest.shards) == SHARDS
    assert calls.opened == {"manifest.json": 1}
    assert calls.looked <= 1
    calls.begin()
    TokenSource(str(folder), manifest)
    assert not calls.opened
    assert not calls.looked


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_thousand_ranks_open_what_their_first_batch_touches(folder: Path, calls: Calls, packing: Packing) -> None:
    """Of each shard the tokens and their hashes, once. Packed, also the shard's bins, and one list of all blocks."""
    assert 2 * SHARD_TOKENS < HASH_BLOCK_BYTES  # so that a shard is verified as a whole
    start = Start(folder, packing, calls, ALWAYS)
    # A sample and its last target lie in two shards at most; the documents of a bin in one.
    most_opens = 2 * 2 * SHARE + (SHARE + 1 if packing == "best_fit" else 0)
    for rank in range(RANKS):
        holds, touched, tokens = start.touched(rank)
        files = {f"{name}.{suffix}" for name in touched for suffix in ("bin", "xxh3")}
        if packing == "best_fit":
            files |= {f"pack{T}.blocks"} | {f"{name}.pack{T}" for name in holds}
        got = start.of_rank(rank)
        assert got.opened == dict.fromkeys(files, 1)
        assert got.looked == 0
        assert got.read_bytes == 2 * tokens + sum((folder / name).stat().st_size for name in files)
        assert got.opened.total() <= most_opens


def test_a_change_of_length_costs_a_start_one_group_more(folder: Path, calls: Calls) -> None:
    """Packed, each length has its list of blocks, and what a change cuts anew is the group that is begun then."""
    changes = [*ALWAYS, Stage(7001, {"a": 1.0}, 2 * T), Stage(15_001, {"a": 1.0}, T)]
    for rank in range(0, RANKS, 64):
        for packing in ("concatenate", "best_fit"):
            at_first = Start(folder, packing, calls, ALWAYS).of_rank(rank).opened
            more = Start(folder, packing, calls, changes).of_rank(rank).opened - at_first
            if packing == "concatenate":
                assert not more
            else:
                assert more.pop(f"pack{2 * T}.blocks") == 1
                assert {Path(name).suffix for name in more} == {f".pack{T}", f".pack{2 * T}"}
                assert more.total() <= 2 * GROUP_BLOCKS
