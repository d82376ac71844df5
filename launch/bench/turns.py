"""Contenders that take turns on one machine: each in a process of its own, built once, timed pair by pair.

What runs beside a benchmark drifts over minutes. Two contenders that alternate within seconds drift together, so the
ratio of a pair is far steadier than either number; the order turns round every round, so that going first is no gain.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, Self

from pretrain.affinity import BIND


class Asked(Protocol):
    """Whoever takes turns: a contender, or one of several that share a process."""

    @property
    def name(self) -> str: ...

    def ask(self, **question: Any) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Place:
    """Where a process stands among those of its run and of its machine, as a launcher tells a rank.

    bound: to its share of the machine's cores. port: where its run meets; None: it is alone there.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    bound: bool = False
    port: int | None = None

    def environment(self) -> dict[str, str]:
        """As variables."""
        names = {"RANK": self.rank, "WORLD_SIZE": self.world}
        names |= {"LOCAL_RANK": self.local_rank, "LOCAL_WORLD_SIZE": self.local_world}
        names |= {"MASTER_PORT": self.port or free_port(), **({BIND: 1} if self.bound else {})}
        return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}


ALONE = Place()
NOTHING_BESIDES: Mapping[str, str] = MappingProxyType({})


class Contender:
    """`python -P -m module args...` that answers each JSON line on its stdin with one on its stdout.

    The first answer comes unasked, once it is built. What it writes to stderr shows only if it ends too early.

    environment: variables set last, over all others.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        threads: int,
        place: Place = ALONE,
        environment: Mapping[str, str] = NOTHING_BESIDES,
    ) -> None:
        self.name = name
        # The threads are fixed before any library reads them.
        told = place.environment() | {"OMP_NUM_THREADS": str(threads)}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process runs)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            env={**os.environ, **told, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended before it read the last question
            self._process.stdin.close()
        try:
            if kind is None:
                self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            pass
        finally:  # after an error, or on its way out of one, nobody waits for its answer
            self._process.kill()
            self._process.wait()
            self._log.close()

    def built(self) -> dict[str, Any]:
        """Wait until it is ready; returns what it says of itself. Raises RuntimeError if it ends instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last_words = " | ".join(self._log.read().strip().splitlines()[-3:])
            raise RuntimeError(f"{self.name} ended with code {self._process.wait()}: {last_words}")
        return json.loads(line)

    def ask(self, **question: Any) -> dict[str, Any]:
        """One turn."""
        self.put(**question)
        return self.built()

    def put(self, **question: Any) -> None:
        """Ask without waiting for the answer."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # who waits for the answer is told why there is none
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()


@dataclass(frozen=True)
class Team:
    """Processes that take a turn together."""

    name: str
    members: Sequence[Contender]

    def ask(self, **question: Any) -> dict[str, Any]:
        """One turn; `members` are their answers in order."""
        for member in self.members:
            member.put(**question)
        return {"members": [member.built() for member in self.members]}


@dataclass(frozen=True)
class Guest:
    """One of several contenders that share a process, since it is the same state that they work on."""

    name: str
    host: Contender

    def ask(self, **question: Any) -> dict[str, Any]:
        """One turn."""
        return self.host.ask(name=self.name, **question)


class Answers:
    """A contender's own side of the conversation."""

    def __init__(self) -> None:
        """What libraries print from now on goes to stderr: it must not end up among the answers."""
        self._stream = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(self, **answer: Any) -> None:
        self._stream.write(json.dumps(answer) + "\n")
        self._stream.flush()

    def questions(self) -> Iterator[dict[str, Any]]:
        """Each as it is asked, until nobody asks any more."""
        return (json.loads(line) for line in sys.stdin)


def take_turns(
    contenders: Sequence[Asked], rounds: int, question: dict[str, Any], on_turn: Callable[[str, int], None]
) -> dict[str, list[dict[str, Any]]]:
    """Ask everyone once a round, the order turned round each time; returns {name: answers by round}."""
    answers: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            on_turn(contender.name, number)
            answers[contender.name].append(contender.ask(**question))
    return answers


@dataclass(frozen=True)
class Spread:
    """Median and extremes of repeated measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours over theirs, round by round."""
    return Spread.of([mine / other for mine, other in zip(ours, theirs, strict=True)])


def check_cores(ranks: int) -> None:
    """Raise ValueError if there is not a core for each of them."""
    if ranks > (cores := len(os.sched_getaffinity(0))):
        raise ValueError(
            f"--ranks {ranks}: each rank needs a core, and this process may use {cores}: take no more ranks"
        )


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
