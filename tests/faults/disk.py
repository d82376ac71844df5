"""Everything that a save does to a folder, seen from inside its process: before each such thing a fault may strike.

The calls are Python's own (`os`, `open`); what is watched knows nothing of it. A file's contents are watched where they
leave the process, beneath Python's buffers, and each write is cut in two, so that a fault finds half of it written.
"""

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

Strike = Callable[[str], None]
"""Called with the name of a write point, such as `fsync step_00000003.tmp/index.json.tmp`, before it happens."""

_CALLS = ("mkdir", "unlink", "rmdir", "fsync", "replace")


class _CutFile(io.FileIO):
    """A file each of whose writes is two."""

    def __init__(self, path: Any, mode: str, name: str, strike: Strike) -> None:
        super().__init__(path, mode)
        self._label, self._strike = name, strike

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        half = len(view) // 2
        self._strike(f"write {self._label}")
        written = super().write(view[:half])
        self._strike(f"write the rest of {self._label}")
        return written + super().write(view[half:])


@contextmanager
def watched(folder: Path, strike: Strike) -> Iterator[None]:
    """Have `strike` called before everything that this process does to `folder` or what is in it."""
    root = os.path.realpath(folder)

    def name_of(path: Any, folder_handle: int | None = None) -> str | None:
        """Relative to the folder; None outside of it."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif folder_handle is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder_handle}"), path)
        relative = os.path.relpath(os.path.abspath(path), root)
        return None if relative.split(os.sep)[0] == ".." else relative

    def watching(verb: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched_call(target: Any, *args: Any, **kwargs: Any) -> Any:
            name = name_of(target, kwargs.get("dir_fd"))
            if name is not None:
                strike(f"{verb} {name} {name_of(args[0])}" if verb == "replace" else f"{verb} {name}")
            return call(target, *args, **kwargs)

        return watched_call

    plain_open = builtins.open

    def watched_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:
        name = None if isinstance(file, int) else name_of(file)
        if name is None or mode.startswith("r"):
            return plain_open(file, mode, *args, **kwargs)
        strike(f"open {name}")
        buffered = io.BufferedWriter(_CutFile(file, mode.replace("b", ""), name, strike))
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding=kwargs.get("encoding"))

    with pytest.MonkeyPatch.context() as patch:
        for verb in _CALLS:
            patch.setattr(os, verb, watching(verb, getattr(os, verb)))
        patch.setattr(builtins, "open", watched_open)
        yield


def at(number: int, befall: Callable[[], None]) -> Strike:
    """Something that befalls this process once, at its n-th write point, from 0 on."""
    seen = 0

    def strike(point: str) -> None:
        nonlocal seen
        seen += 1
        if seen == number + 1:
            befall()

    return strike


def kill(victims: Sequence[int]) -> None:
    """SIGKILL to these processes, to this one after the others."""
    for victim in sorted(victims, key=lambda pid: pid == os.getpid()):
        os.kill(victim, signal.SIGKILL)


def fail() -> None:
    """What a disk says that is broken."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))
