"""What a run's folder tells, in the order of time: events.jsonl and attempts.jsonl together, and what is new there."""

import heapq
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

from pretrain.run_dir import RunDir, parsed_events


class Feed:
    """The events of a run's two files; each call of `new` goes on where the last one ended."""

    def __init__(self, run: RunDir) -> None:
        self._read = dict.fromkeys((run.attempts_path, run.events_path), 0)

    def new(self) -> Iterator[dict[str, Any]]:
        """One by one, so that a long run's need not be in memory together."""
        streams = (parsed_events(self._lines(path)) for path in self._read)
        return heapq.merge(*streams, key=itemgetter("time"))

    def _lines(self, path: Path) -> Iterator[bytes]:
        """New lines that are ended; the last may be in the middle of being written."""
        if not path.is_file():
            return
        with open(path, "rb") as file:
            file.seek(self._read[path])
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read[path] += len(line)
                yield line
