"""`steppe` with faults in its ranks: `python -m tests.faults.faulty_run words...`, the faults in the environment.

Launcher, ranks and all that they do are the product's own; only the module that a rank is started as is this one, which
has the faults strike at the write points of the run's saves and then is `pretrain.worker`.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

from pretrain.run_dir import RunDir, read_events
from tests.conftest import environment
from tests.dist.harness import ROOT
from tests.faults import disk

FAULTS = "STEPPE_TEST_FAULTS"
SECONDS = 60  # that a disk is slow at the most


@dataclass(frozen=True)
class Fault:
    """What befalls a rank before a write point whose name matches `point`, a regular expression.

    kill: this rank. kill all: every rank at once. fail: the disk says EIO. slow: it takes until `step` is made.
    """

    rank: int
    point: str
    what: Literal["kill", "kill all", "fail", "slow"]
    step: int = 0


def faulty(faults: Sequence[Fault], *words: object, code: int) -> str:
    """Run `steppe words...` with faults to its end; returns what it says on stderr. code: its exit code."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tests.faults.faulty_run", *map(str, words)],
        capture_output=True,
        text=True,
        env={**environment(), "PYTHONPATH": str(ROOT), FAULTS: json.dumps([asdict(fault) for fault in faults])},
        timeout=300,
        check=False,
    )
    assert done.returncode == code, f"exit code {done.returncode}, not {code}: {done.stdout}\n{done.stderr}"
    return done.stderr


def main() -> None:
    """The launcher, or one of its ranks."""
    if "RANK" in os.environ:
        rank()
    else:
        launcher()


def launcher() -> None:
    """The command line, whose ranks are started as this module."""
    from launch import cli, ranks, run

    def run_ranks(module: str, args: list[str], nproc: int) -> None:
        assert module == "pretrain.worker"
        ranks.run_ranks("tests.faults.faulty_run", args, nproc)

    run.run_ranks = run_ranks
    cli.main()


def rank() -> None:
    """A rank, with its faults."""
    from pretrain import worker

    run = RunDir(Path(sys.argv[1]))
    faults = [Fault(**fault) for fault in json.loads(os.environ[FAULTS])]

    def strike(point: str) -> None:
        for fault in faults:
            if fault.rank == int(os.environ["RANK"]) and re.fullmatch(fault.point, point):
                befall(fault, run)

    with disk.watched(run.checkpoints, strike):
        worker.main()


def befall(fault: Fault, run: RunDir) -> None:
    """The fault happens."""
    if fault.what == "slow":
        deadline = time.monotonic() + SECONDS
        while read_events(run.events_path, "step")[-1]["step"] < fault.step and time.monotonic() < deadline:
            time.sleep(0.02)
    elif fault.what == "fail":
        disk.fail()
    else:
        peers = [process.pid for process in psutil.Process(os.getppid()).children()]
        disk.kill([os.getpid()] if fault.what == "kill" else peers)


if __name__ == "__main__":
    main()
