"""A Python whose ranks meet with faults; `faults/rank_faults.py` has them strike. A profile names it as `python`."""

import json
import sysconfig
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

HOOKS = Path(__file__).with_name("faults")
NEVER = 10**9


@dataclass(frozen=True)
class Fault:
    """What befalls a rank (None: each) at steps `first` to `last`, only the first time that it could or every time.

    nan: a gradient is not a number on this rank. raise: it raises inside backward. hang: it sleeps for ever in its
    step. hold: it waits before its step until the fault is taken away. hold save: and before it writes its part of
    the checkpoint of that step. slow: no step begins sooner than `seconds` after the one before. garbage: the targets
    of steps that begin at `positions` make no sense.
    """

    what: Literal["nan", "raise", "hang", "hold", "hold save", "slow", "garbage"]
    first: int = 0
    last: int = NEVER
    rank: int | None = None
    once: bool = False
    seconds: float = 0.0
    positions: tuple[int, int] = (0, 0)


def once(what: Literal["nan", "raise", "hang"], step: int, rank: int) -> Fault:
    """A fault that strikes one rank at one step, and not again when the step is made again."""
    return Fault(what, first=step, last=step, rank=rank, once=True)


def hold(step: int) -> Fault:
    """Wait before a step: the run stays where it is, with ranks that are at work."""
    return Fault("hold", first=step, last=step, rank=0)


class FaultyPython:
    """A virtual environment over this one, with the faults of one run; they may be changed while it runs."""

    def __init__(self, folder: Path, faults: Sequence[Fault] = ()) -> None:
        venv.create(folder, symlinks=True)
        self.folder, self.path = folder, folder / "bin" / "python"
        (here,) = folder.glob("lib/python*/site-packages")
        lines = (
            f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})",
            f"import sys; sys.path.append({str(HOOKS)!r}); import rank_faults",
        )
        (here / "faults.pth").write_text("\n".join(lines) + "\n")
        self.faults: list[Fault] = []
        self.add(*faults)

    def add(self, *faults: Fault) -> None:
        self._write([*self.faults, *faults])

    def remove(self, *faults: Fault) -> None:
        """Take faults away; who is held by one goes on."""
        self._write([fault for fault in self.faults if fault not in faults])

    def has_struck(self, fault: Fault) -> bool:
        """Whether a fault that strikes once has."""
        return (self.folder / f"struck_{fault.what}_{fault.first}").exists()

    def _write(self, faults: list[Fault]) -> None:
        self.faults = faults
        scratch = self.folder / "faults.json.tmp"
        scratch.write_text(json.dumps([asdict(fault) for fault in faults]))
        scratch.replace(self.folder / "faults.json")
