"""A bounded folder of files that were fetched from elsewhere, shared by all processes of a machine.

An entry is fetched once, whoever needs it first; the others wait for it. Everything rests on `flock`, which the kernel
gives up for a process that dies:

CACHE/ENTRY         an entry; whoever has it open holds a shared lock, and is safe from its eviction
CACHE/ENTRY.tmp     an entry that is being written, locked likewise; unlocked, it is what a crash left
CACHE/ENTRY.lock    is locked by who fetches the entry, and is gone when that is done
CACHE/usage         bytes of all entries; its lock is that of the folder: files come, go and change size only under it
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.config import MIB
from data_pipeline.file_locks import is_at, try_lock

CHUNK_BYTES = 8 * MIB
"""Most bytes of an entry: large enough for the throughput of an object store, a multiple of the hash block."""
SMALLEST_CACHE_CHUNKS = 16
TEMPORARY_SUFFIX = ".tmp"
LOCK_SUFFIX = ".lock"
USAGE_NAME = "usage"
FULL_SECONDS = 30.0
"""How long to wait for others to let go of entries, when all that could make room are in use."""


class ShardCache:
    """Files by name, at most `max_bytes` of them, the least recently used evicted first. For any number of threads.

    What an entry holds is for the caller to check: a file of the cache may be damaged as any other.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        """Make the folder if it is not there.

        Raises:
            ValueError: it is too small to be of use, or cannot be made.
        """
        if max_bytes < SMALLEST_CACHE_CHUNKS * CHUNK_BYTES:
            raise ValueError(
                f"data.cache.max_bytes is {max_bytes:,}, but a cache needs at least "
                f"{SMALLEST_CACHE_CHUNKS * CHUNK_BYTES:,}: raise it"
            )
        self.max_bytes = max_bytes
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cannot make the cache folder {folder} ({error.strerror}): set data.cache.folder"
            ) from None

    def open(self, entry: str, fetch: Callable[[], bytes]) -> tuple[int, bool]:
        """A file descriptor of an entry, for the caller to close, and whether it had to be waited for.

        `fetch` gets the content where the entry is not there; it is called by one process at a time.

        Raises:
            ValueError: the cache is full of entries that are in use.
            OSError: the disk is full or the like. What `fetch` raises is passed on.
        """
        path = self._folder / entry
        present = _open_shared(path)
        if present is not None:
            return present, False
        lock_path = path.with_name(path.name + LOCK_SUFFIX)
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not is_at(lock, lock_path):
                    continue  # who had it is done, and another file may have its name by now
                try:
                    present = _open_shared(path)
                    return (self._fill(path, fetch()) if present is None else present), True
                finally:
                    lock_path.unlink()
            finally:
                os.close(lock)

    def drop(self, entry: str, descriptor: int) -> None:
        """Take out an entry that is damaged, open at this descriptor, unless it has been replaced already."""
        self._remove(self._folder / entry, descriptor)

    def _remove(self, path: Path, descriptor: int) -> None:
        """Remove a file, if it is still the one that is open at this descriptor."""
        with self._locked() as usage:
            if is_at(descriptor, path):
                used = self._usage(usage)
                path.unlink()
                _write_usage(usage, used - os.fstat(descriptor).st_size)

    def _fill(self, path: Path, content: bytes) -> int:
        """Make an entry, by who has its lock; its descriptor."""
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        descriptor = self._make_room(temporary, len(content))
        try:
            written = 0
            while written < len(content):
                written += os.pwrite(descriptor, memoryview(content)[written:], written)
            # Not fsynced: what a power failure leaves is found by its hash.
            with self._locked():
                os.rename(temporary, path)
        except BaseException:
            self._remove(temporary, descriptor)
            os.close(descriptor)
            raise
        return descriptor

    def _make_room(self, temporary: Path, size: int) -> int:
        """A temporary file of this size, locked and counted; its descriptor."""
        deadline = time.monotonic() + FULL_SECONDS
        while True:
            with self._locked() as usage:
                used = self._usage(usage)
                if used + size > self.max_bytes:
                    # A little more than is needed, since each eviction looks at the whole folder.
                    used = self._evict(self.max_bytes - max(size, self.max_bytes // SMALLEST_CACHE_CHUNKS))
                    _write_usage(usage, used)
                if used + size <= self.max_bytes:
                    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    # In this order: a crash between the two leaves too much counted, never too little.
                    _write_usage(usage, used + size - os.fstat(descriptor).st_size)
                    os.ftruncate(descriptor, size)
                    return descriptor
            if time.monotonic() > deadline:
                raise ValueError(
                    f"the cache {self._folder} holds {used:,} bytes, all of them in use, and may hold "
                    f"{self.max_bytes:,}: raise data.cache.max_bytes"
                )
            time.sleep(0.05)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = os.open(self._folder / USAGE_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _usage(self, usage: int) -> int:
        """Bytes of all entries, as counted. A crash can only leave too many counted, which the next eviction mends."""
        text = os.pread(usage, 32, 0).strip()
        return int(text) if text.isdigit() else sum(size for _, size, _ in self._entries())

    def _entries(self) -> list[tuple[int, int, Path]]:
        """(time of the last use, size, path) of all entries, also of those on their way. While the folder is locked."""
        found = []
        for folder, _, names in os.walk(self._folder):
            for name in set(names) - {USAGE_NAME}:
                path = Path(folder, name)
                with suppress(FileNotFoundError):  # a lock
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
        return found

    def _evict(self, goal: int) -> int:
        """Remove entries that nobody has open, the least recently used first, until `goal` bytes are left.

        Also removes what crashes left. Returns the bytes that are left.
        """
        entries = sorted(self._entries())
        left = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if (left > goal or path.suffix in (TEMPORARY_SUFFIX, LOCK_SUFFIX)) and _remove_unless_locked(path):
                left -= size
        return left


def release(descriptor: int) -> None:
    """Close an entry, which was in use until now."""
    os.utime(descriptor)
    os.close(descriptor)


def _open_shared(path: Path) -> int | None:
    """Open an entry and keep it from eviction; None if it is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink:
        os.utime(descriptor)
        return descriptor
    os.close(descriptor)  # it was evicted before we had the lock
    return None


def _remove_unless_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:  # a lock
        return False
    try:
        if not try_lock(descriptor) or not is_at(descriptor, path):
            return False
        path.unlink()
        return True
    finally:
        os.close(descriptor)


def _write_usage(usage: int, used: int) -> None:
    os.pwrite(usage, b"%020d" % max(0, used), 0)
