"""Readers of a data folder on a server, and what is fetched meanwhile: counted by events, never by the clock."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import shard_cache
from data_pipeline.cached_folder import CachedFolder
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.loader import Loader
from data_pipeline.manifest import Manifest
from data_pipeline.order import Stage
from data_pipeline.prefetch import Prefetcher
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
from tests.unit.data_pipeline.servers import PATIENCE_SECONDS

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def far(write_folder: WriteFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[FarFolder]:
    with serve_far_folder(write_folder, monkeypatch) as far:
        yield far


class Fetched:
    """Numbers of the chunks that have been fetched ahead."""

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self._changed = threading.Condition()

    def add(self, number: int) -> None:
        with self._changed:
            self.numbers.add(number)
            self._changed.notify_all()

    def wait_for(self, numbers: set[int]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: numbers <= self.numbers, PATIENCE_SECONDS)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Fetched:
    fetched = Fetched()
    fetch_ahead = CachedFolder._fetch_ahead

    def fetch(self: CachedFolder, number: int) -> None:
        fetch_ahead(self, number)
        fetched.add(number)

    monkeypatch.setattr(CachedFolder, "_fetch_ahead", fetch)
    return fetched


@pytest.fixture
def patient(fetched: Fetched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever announces what it will read then takes as long as that takes to come, as a step of training does."""
    want = Prefetcher.want

    def want_and_wait(self: Prefetcher, numbers: Iterable[int]) -> None:
        wanted = list(numbers)
        want(self, wanted)
        fetched.wait_for(set(wanted))

    monkeypatch.setattr(Prefetcher, "want", want_and_wait)


@pytest.mark.usefixtures("patient")
def test_what_was_announced_is_not_waited_for(far: FarFolder) -> None:
    order = np.random.default_rng(0).permutation(196) * 5000
    batches = [order[i : i + 4] for i in range(0, len(order), 4)]
    counts = np.full(4, 5001)
    source = far.open()
    source.prefetch(order[: 3 * 4], np.full(3 * 4, 5001))
    for batch, coming in itertools.zip_longest(batches, batches[3:], fillvalue=order[:0]):
        source.prefetch(coming, counts[: len(coming)])
        out = np.empty((4, 5001), dtype="<u2")
        source.read(batch, counts, out.reshape(-1), np.arange(4) * 5001)
        assert np.array_equal(out, TOKENS[batch[:, None] + np.arange(5001)])
    assert source.waits == 0
    assert len(far.server.gets(".bin")) == CHUNKS


@pytest.mark.usefixtures("patient")
def test_a_loader_announces_all_that_it_reads(far: FarFolder) -> None:
    """It has the batches that it has from a local folder, and waits for no chunk that had the time to come."""
    here = DataConfig(
        sequence_length=200,
        sources=(SourceConfig(name="a", path=str(far.path)),),
        shuffle_block_bytes=CHUNK,
        shuffle_group_blocks=2,
        cache=far.cache,
    )
    there = here.model_copy(update={"sources": (SourceConfig(name="a", path=far.url),)})
    plan = [(first, 64) for first in range(0, 64 * 70, 64)]
    loaders = [Loader(data, 0, [Stage(0, {"a": 1.0}, 200)], 0, 1, 32, False, iter(plan)) for data in (here, there)]
    local, remote = ([[batch.tokens.tolist() for batch in batches] for batches in loader] for loader in loaders)
    assert len(local) == 70
    assert local == remote
    (source,) = loaders[1]._opened
    assert source.waits == 0
    assert len(far.server.gets(".bin")) == CHUNKS
    for loader in loaders:
        loader.close()


def test_what_is_on_its_way_is_waited_for_and_not_fetched_again(
    far: FarFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = far.open()
    far.server.hold()
    source.prefetch(np.array([0]), np.array([1000]))
    far.server.wait_for_gets(1, ".bin")
    missed = threading.Event()
    open_shared = shard_cache._open_shared

    def note_a_miss(path: Path) -> int | None:
        opened = open_shared(path)
        if opened is None and threading.current_thread() is reader:
            missed.set()
        return opened

    monkeypatch.setattr(shard_cache, "_open_shared", note_a_miss)
    got: list[np.ndarray] = []
    reader = threading.Thread(target=lambda: got.append(source.read_tokens(0, 1000)))
    reader.start()
    assert missed.wait(PATIENCE_SECONDS)
    far.server.release()
    reader.join()
    assert np.array_equal(got[0], TOKENS[:1000])
    assert source.waits == 1
    assert len(far.server.gets(".bin")) == 1


def test_prefetch_stays_within_half_of_the_cache(far: FarFolder, fetched: Fetched) -> None:
    source = far.open(max_bytes=16 * CHUNK)
    source.prefetch(np.arange(0, 900_000, 30_000), np.full(30, 1000))
    fetched.wait_for(set(range(8)))
    ends = [(f"/data/shard_{number // 5:05d}.bin", number % 5) for number in range(8)]
    assert {(request.path, request.range) for request in far.server.gets(".bin")} == {
        (path, f"bytes={chunk * CHUNK}-{min((chunk + 1) * CHUNK, 2 * SHARD_TOKENS) - 1}") for path, chunk in ends
    }
    source.read_tokens(0, 1)  # which makes room for one more
    fetched.wait_for(set(range(9)))
    source.close()
    assert len(far.server.gets(".bin")) == 9


def test_a_crash_loses_what_was_on_its_way(far: FarFolder) -> None:
    """Ranks are killed while they fetch; what had come by then is not fetched again."""
    ranks = 5
    for seed in range(ranks):
        far.server.hold(after=2)
        gets = len(far.server.gets(".bin"))
        rank = FORK.Process(target=read_as_a_rank, args=(far.url, Manifest.load(far.path), far.cache, seed))
        rank.start()
        far.server.wait_for_gets(gets + 3, ".bin")
        assert rank.pid is not None
        os.kill(rank.pid, signal.SIGKILL)
        rank.join()
        far.server.release()
    check_runs(far.open(), ranks)
    assert len(far.server.gets(".bin")) == CHUNKS + ranks
