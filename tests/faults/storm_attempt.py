"""One attempt at a run: the real command line in processes of its own, watched through events.jsonl, and killed."""

import json
import subprocess
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.conftest import command, environment
from tests.faults.storm_plan import Target

# In the environment of an attempt's launcher, which its ranks inherit: they are found even when it is gone.
MARK = "STEPPE_KILL_STORM_ATTEMPT"
POLL_SECONDS = 0.002
# What is done to a process that has ended a moment ago, or is another user's.
GONE = (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError)


class StormError(Exception):
    """Something that no kill may bring about: what was promised, and what came of it."""


class EventTail:
    """What is appended to an events.jsonl from now on. A line that a kill cut short is left out."""

    def __init__(self, path: Path) -> None:
        self.path, self.rest = path, b""
        self.offset = path.stat().st_size if path.is_file() else 0
        self.events: list[dict[str, Any]] = []

    def read(self) -> None:
        """Add what is new to `events`."""
        if not self.path.is_file():
            return
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            new = file.read()
        self.offset += len(new)
        *lines, self.rest = (self.rest + new).split(b"\n")
        for line in lines:
            try:
                self.events.append(json.loads(line))
            except json.JSONDecodeError:
                continue

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind]


class Attempt:
    """`steppe words...` under way; leaving its context kills whatever is left of it.

    events_path: of the run, which need not exist yet. log_path: where launcher and first rank speak to.
    """

    def __init__(self, words: Sequence[object], events_path: Path, log_path: Path) -> None:
        self.mark, self.log_path = uuid.uuid4().hex, log_path
        self.tail = EventTail(events_path)
        self.begun = time.monotonic()
        with open(log_path, "w", encoding="utf-8") as log:
            # In a session of its own: Ctrl-C in a terminal is for the storm, not for what it watches.
            self.process = subprocess.Popen(
                command(*words),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**environment(), MARK: self.mark},
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill_rest()

    def processes(self) -> list[psutil.Process]:
        """Launcher and ranks that are alive, also those whose launcher is not."""
        self.process.poll()  # a dead child stays in the table until it is asked for
        found = []
        for process in psutil.process_iter():
            with suppress(*GONE):
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """The ranks, in the order of their numbers; not their watchdogs."""
        numbered = []
        for process in self.processes():
            with suppress(*GONE):
                number = process.environ().get("RANK") if process.pid != self.process.pid else None
                if number is not None and "watchdog_process" not in " ".join(process.cmdline()):
                    numbered.append((int(number), process.pid, process))
        return [process for _, _, process in sorted(numbered)]

    def watch(self, until: float) -> bool:
        """Wait a moment for events; whether it is still before `until` (monotonic). Raises StormError if the attempt
        has ended by itself."""
        ended = self.process.poll()
        self.tail.read()
        if ended is not None:
            raise StormError(f"the attempt ended by itself with exit code {ended} before it was killed: {self.said()}")
        time.sleep(POLL_SECONDS)
        return time.monotonic() < until

    def await_events(self, kind: str, count: int, seconds: float) -> None:
        """Return once there are so many events of a kind. Raises StormError if that takes longer."""
        until = time.monotonic() + seconds
        while len(self.tail.of(kind)) < count:
            if not self.watch(until):
                raise StormError(f"there is no {kind} event {count} after {seconds:.0f} s: {self.said()}")

    def await_save(self, checkpoints: Path, seconds: float) -> None:
        """Return once a save has begun that was not there before. Raises StormError if that takes longer."""
        until, before = time.monotonic() + seconds, unfinished_saves(checkpoints)
        while not unfinished_saves(checkpoints) - before:
            if not self.watch(until):
                raise StormError(f"no save has begun after {seconds:.0f} s: {self.said()}")

    def strike(self, target: Target, which: float, ranks: list[psutil.Process]) -> str:
        """SIGKILL; returns whom it hit. Where there was no rank yet, the launcher is all there was."""
        if target == "one rank" and ranks:
            number = int(which * len(ranks))
            with suppress(*GONE):
                ranks[number].kill()
            return f"rank {number}"
        self.process.kill()
        if target == "launcher" and ranks:
            return "launcher"
        for rank in ranks:
            with suppress(*GONE):
                rank.kill()
        self.kill_rest()  # the launcher may have been starting ranks while they were looked for
        return "all"

    def kill_rest(self) -> None:
        """SIGKILL to whatever is left of the attempt, until there is nothing."""
        while left := self.processes():
            for process in left:
                with suppress(*GONE):
                    process.kill()

    def wait_gone(self, seconds: float) -> None:
        """Wait until nothing of the attempt is alive. Raises StormError if that takes longer."""
        until = time.monotonic() + seconds
        while left := self.processes():
            if time.monotonic() > until:
                raise StormError(f"{len(left)} processes are still alive {seconds:.0f} s after the kill: {self.said()}")
            time.sleep(25 * POLL_SECONDS)
        self.process.wait()
        self.tail.read()

    def finish(self, seconds: float) -> None:
        """Wait until it ends by itself. Raises StormError if that takes longer or it fails."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise StormError(f"the attempt is not through after {seconds:.0f} s: {self.said()}") from None
        self.tail.read()
        if code:
            raise StormError(f"the attempt failed with exit code {code}: {self.said()}")

    def said(self) -> str:
        """The last lines of launcher and first rank."""
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"{' | '.join(line.strip() for line in lines[-4:])} ({self.log_path})"


def unfinished_saves(checkpoints: Path) -> set[tuple[str, int]]:
    """What kills have left of saves under way: names of temporary folders, and when each was last written to."""
    found = set()
    for path in checkpoints.glob("*.tmp"):
        with suppress(FileNotFoundError):  # it has just got its final name
            found.add((path.name, path.stat().st_mtime_ns))
    return found
