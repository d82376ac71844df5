"""What a run's folder tells, in the order of time: events.jsonl and attempts.jsonl together, and what is new there."""

import heapq
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

from pretrain.run_dir import RunDir, parsed_events


class FileFeed:
    """The events of one file; each call of `new` goes on where the last one ended."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def new(self) -> Iterator[dict[str, Any]]:
        """One by one, so that a long run's need not be in memory together; none if there is no such file."""
        return parsed_events(self._lines())

    def _lines(self) -> Iterator[bytes]:
        """New lines that are ended; the last may be in the middle of being written."""
        if not self._path.is_file():
            return
        with open(self._path, "rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                yield line


class Feed:
    """The events of a run's two files; each call of `new` goes on where the last one ended."""

    def __init__(self, run: RunDir) -> None:
        self._files = [FileFeed(path) for path in (run.attempts_path, run.events_path)]

    def new(self) -> Iterator[dict[str, Any]]:
        """One by one, in the order of time."""
        return heapq.merge(*(file.new() for file in self._files), key=itemgetter("time"))
