import fcntl
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline import shard_cache
from data_pipeline.shard_cache import ShardCache, release
from tests.unit.data_pipeline.locks import ask_as_nfs_does

KB = 1024
SIZE = 4 * KB
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "CHUNK_BYTES", SIZE)


def content(entry: str) -> bytes:
    return random.Random(entry).randbytes(SIZE)


def use(cache: ShardCache, entry: str, seconds: float = 0.0) -> bool:
    """Open an entry, check what it holds and close it after a while; whether it was waited for."""
    descriptor, waited = cache.open(entry, lambda: content(entry))
    assert os.pread(descriptor, SIZE + 1, 0) == content(entry)
    time.sleep(seconds)
    release(descriptor)
    return waited


def files(folder: Path) -> dict[str, int]:
    """Size of all files but that of the usage, at one moment."""
    with (folder / "usage").open("a") as usage:
        fcntl.flock(usage, fcntl.LOCK_EX)
        return {
            str(path.relative_to(folder)): path.stat().st_size if path.suffix != ".lock" else 0
            for path in folder.rglob("*")
            if path.is_file() and path.name != "usage"
        }


def usage(folder: Path) -> int:
    return int((folder / "usage").read_text())


def test_locks_are_such_as_nfs_grants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_as_nfs_does(monkeypatch)
    cache = ShardCache(tmp_path / "cache", 16 * SIZE)
    for number in range(40):
        assert use(cache, str(number))
    assert len(files(tmp_path / "cache")) <= 16


def test_an_entry_is_fetched_once(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 16 * SIZE)
    assert use(cache, "a/b/0")
    assert not use(cache, "a/b/0")
    assert not use(ShardCache(tmp_path / "cache", 16 * SIZE), "a/b/0")
    assert use(cache, "a/b/1")
    assert files(tmp_path / "cache") == {"a/b/0": SIZE, "a/b/1": SIZE}
    assert usage(tmp_path / "cache") == 2 * SIZE


def test_the_least_recently_used_go(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 16 * SIZE)
    tick = 0.011  # the times of files are no finer
    for number in range(16):
        use(cache, str(number), tick)
    use(cache, "0", tick)
    held, _ = cache.open("1", lambda: b"")
    os.close(cache.open("2", lambda: b"")[0])
    for number in range(16, 24):
        use(cache, str(number), tick)
        assert sum(files(tmp_path).values()) == usage(tmp_path) <= 16 * SIZE
    assert set(files(tmp_path)) == {str(number) for number in (0, 1, 2, *range(11, 24))}
    assert os.pread(held, SIZE, 0) == content("1")
    for number in range(24, 60):
        use(cache, str(number))
    assert "1" in files(tmp_path)
    release(held)


def test_a_cache_that_is_full_of_what_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "FULL_SECONDS", 0.2)
    cache = ShardCache(tmp_path, 16 * SIZE)
    held = [cache.open(str(number), lambda: bytes(SIZE))[0] for number in range(16)]
    with pytest.raises(ValueError, match=r"holds 65,536 bytes, all of them in use, .* raise data.cache.max_bytes"):
        use(cache, "one more")
    assert usage(tmp_path) == sum(files(tmp_path).values()) == 16 * SIZE
    threading.Timer(0.1, release, [held[3]]).start()
    assert use(cache, "one more")
    assert "3" not in files(tmp_path)


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 16 * SIZE)

    def fail() -> bytes:
        raise OSError("no network")

    with pytest.raises(OSError, match="no network"):
        cache.open("a/0", fail)
    assert not files(tmp_path)
    assert use(cache, "a/0")
    assert usage(tmp_path) == SIZE


def test_a_damaged_entry_is_dropped_once(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 16 * SIZE)
    one, _ = cache.open("a", lambda: b"damaged")
    other, _ = cache.open("a", lambda: b"")
    cache.drop("a", one)
    assert use(cache, "a")
    cache.drop("a", other)  # which is of the past
    assert not use(cache, "a")
    assert usage(tmp_path) == SIZE
    os.close(one)
    os.close(other)


def fetch_all(folder: Path, log: Path, entries: list[str], seed: int) -> None:
    cache = ShardCache(folder, 64 * SIZE)
    random.Random(seed).shuffle(entries)

    def fetch(entry: str) -> bytes:
        with log.open("a") as file:
            file.write(f"{entry}\n")
        time.sleep(0.002)
        return content(entry)

    for entry in entries:
        descriptor, _ = cache.open(entry, lambda entry=entry: fetch(entry))  # type: ignore[misc]
        assert os.pread(descriptor, SIZE, 0) == content(entry)
        release(descriptor)


def test_processes_fetch_each_entry_once_together(tmp_path: Path) -> None:
    entries = [f"shard_{number % 3}/{number}" for number in range(60)]
    workers = [
        FORK.Process(target=fetch_all, args=(tmp_path / "cache", tmp_path / "log", entries, seed)) for seed in range(6)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert sorted((tmp_path / "log").read_text().split()) == sorted(entries)
    assert usage(tmp_path / "cache") == 60 * SIZE


def test_a_reader_waits_for_the_fetch_of_another_thread(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 16 * SIZE)
    fetching = threading.Event()
    go_on = threading.Event()

    def slowly() -> bytes:
        fetching.set()
        go_on.wait()
        return content("a")

    thread = threading.Thread(target=lambda: os.close(cache.open("a", slowly)[0]))
    thread.start()
    fetching.wait()
    assert use(cache, "b"), "others are not held up"
    threading.Timer(0.05, go_on.set).start()
    assert use(cache, "a")
    thread.join()


def fetch_forever(folder: Path, started: Path) -> None:
    def hang() -> bytes:
        started.touch()
        time.sleep(100)
        return b""

    ShardCache(folder, 16 * SIZE).open("a", hang)


def test_a_fetcher_that_is_killed(tmp_path: Path) -> None:
    worker = FORK.Process(target=fetch_forever, args=(tmp_path / "cache", tmp_path / "started"))
    worker.start()
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert list(files(tmp_path / "cache")) == ["a.lock"]
    assert use(ShardCache(tmp_path / "cache", 16 * SIZE), "a")
    assert files(tmp_path / "cache") == {"a": SIZE}


def test_what_a_crash_left_of_an_entry_is_counted_once(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 16 * SIZE)
    use(cache, "b")
    (tmp_path / "a.tmp").write_bytes(bytes(SIZE))  # counted before it was written
    (tmp_path / "usage").write_text(str(2 * SIZE))
    use(cache, "a")
    assert usage(tmp_path) == sum(files(tmp_path).values()) == 2 * SIZE


def test_what_crashes_left_is_evicted(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 16 * SIZE)
    (tmp_path / "torn.tmp").write_bytes(bytes(3 * SIZE))
    for number in range(14):
        use(cache, str(number))
    assert usage(tmp_path) == sum(files(tmp_path).values()) <= 16 * SIZE
    assert "torn.tmp" not in files(tmp_path)
    (tmp_path / "usage").write_text("")
    use(cache, "one more")
    assert usage(tmp_path) == sum(files(tmp_path).values()) <= 16 * SIZE


def read_forever(folder: Path, seed: int) -> None:
    cache = ShardCache(folder, 16 * SIZE)
    chosen = random.Random(seed)
    while True:
        use(cache, f"{chosen.randrange(3)}/{chosen.randrange(40)}")


@pytest.fixture
def readers(tmp_path: Path) -> Iterator[list[multiprocessing.Process]]:
    started: list[multiprocessing.Process] = []
    yield started
    for reader in started:
        reader.kill()
        reader.join()


def test_the_bound_holds_through_kills(tmp_path: Path, readers: list) -> None:
    """At every moment, whoever reads and dies; what is counted is never less than what is there."""
    chosen = random.Random(0)
    for seed in range(16):
        readers.append(FORK.Process(target=read_forever, args=(tmp_path, seed)))
        readers[-1].start()
        for _ in range(5):
            time.sleep(0.01)
            assert sum(files(tmp_path).values()) <= 16 * SIZE
        if len(readers) > 3:
            victim = readers.pop(chosen.randrange(len(readers)))
            assert victim.exitcode is None
            victim.kill()
            victim.join()
    for reader in readers:
        assert reader.exitcode is None
        reader.kill()
        reader.join()
    assert sum(files(tmp_path).values()) <= usage(tmp_path) <= 16 * SIZE
    cache = ShardCache(tmp_path, 16 * SIZE)
    for number in range(30):
        use(cache, f"again/{number}")
    assert usage(tmp_path) == sum(files(tmp_path).values())


def test_unusable_caches(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.cache.max_bytes is 65,535, but a cache needs at least 65,536: raise"):
        ShardCache(tmp_path, 16 * SIZE - 1)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot make the cache folder .*/file/x \(Not a directory\): set data.cache"):
        ShardCache(tmp_path / "file" / "x", 16 * SIZE)
