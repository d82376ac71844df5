"""Fetching ahead of a reader, in the order in which it will read, by threads of its process."""

import threading
from collections.abc import Callable, Iterable

FETCHERS = 4
"""Threads: a single stream from an object store is slower than a reader."""
CLOSE_SECONDS = 5.0


class Prefetcher:
    """Calls `fetch` for numbered things that will be wanted, but for at most `ahead` that were not yet taken.

    The methods are for the reader's thread; `fetch` is called by others.
    """

    def __init__(self, fetch: Callable[[int], None], ahead: int) -> None:
        """No thread starts before something is wanted."""
        assert ahead > 0
        self._fetch = fetch
        self._room = ahead
        self._wanted: dict[int, None] = {}  # in their order; a dict is a set that keeps it
        self._ahead: set[int] = set()  # fetched, or being fetched, and not yet taken
        self._changed = threading.Condition()
        self._closing = False
        self._threads: list[threading.Thread] = []

    def want(self, numbers: Iterable[int]) -> None:
        """What the reader will take next, after all that it said before."""
        with self._changed:
            for number in numbers:
                if number not in self._ahead:
                    self._wanted.setdefault(number)
            self._changed.notify_all()
        if self._wanted and not self._threads:
            self._closing = False
            self._threads = [threading.Thread(target=self._work, name="fetch", daemon=True) for _ in range(FETCHERS)]
            for thread in self._threads:
                thread.start()

    def taken(self, number: int) -> None:
        """The reader takes this now, whether it has been fetched or not."""
        with self._changed:
            self._wanted.pop(number, None)
            self._ahead.discard(number)
            self._changed.notify_all()

    def close(self) -> None:
        """Forget what is wanted and stop. A fetch that hangs is left to itself: it dies with the process."""
        with self._changed:
            self._closing = True
            self._wanted.clear()
            self._ahead.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(CLOSE_SECONDS)
        self._threads = []

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or (self._wanted and len(self._ahead) < self._room))
                if self._closing:
                    return
                number = next(iter(self._wanted))
                del self._wanted[number]
                self._ahead.add(number)
            try:
                self._fetch(number)
            except Exception:
                # The reader meets the same when it comes here, and is the one to say so.
                self.taken(number)
