"""`steppe` with faults in its ranks: `python -m tests.faults.faulty_run words...`, the faults in the environment.

Launcher, ranks and all that they do are the product's own; only the module that a rank is started as is this one, which
has the faults strike at the write points of the run's saves and then is `pretrain.worker`.
"""

import json
import os
import re
import signal
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
    """What befalls a rank before a write point, after a beat of its watchdog such as `step 5`, or in a step's first
    `forward` pass; `point` is a regular expression that its name matches.

    kill: this rank. kill all: every rank at once. fail: the disk says EIO. slow: it takes until `step` is made.
    stop: SIGSTOP. sleep: for ever, in Python. hold: for ever, in C and with the interpreter's lock held.
    uninterruptible: for ever, in the kernel, in state D. drag: it takes a moment longer.
    """

    rank: int
    point: str
    what: Literal["kill", "kill all", "fail", "slow", "stop", "sleep", "hold", "uninterruptible", "drag"]
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
    from pretrain.watchdog import Watchdog

    run = RunDir(Path(sys.argv[1]))
    faults = [Fault(**fault) for fault in json.loads(os.environ[FAULTS])]

    def strike(point: str) -> None:
        for fault in faults:
            if fault.rank == int(os.environ["RANK"]) and re.fullmatch(fault.point, point):
                befall(fault, run)

    beat = Watchdog.beat

    def beat_and_strike(watchdog: Watchdog, step: int, phase: str) -> None:
        beat(watchdog, step, phase)
        if phase == "loading":
            strike_in_forward(strike)
        strike(f"{phase} {step}")

    Watchdog.beat = beat_and_strike
    with disk.watched(run.checkpoints, strike):
        worker.main()


def strike_in_forward(strike: disk.Strike) -> None:
    """Within what a rank times of its own. Only once it has imported torch: no rank begins with that."""
    from pretrain.device import Stopwatch

    start = Stopwatch.start

    def start_and_strike(watch: Stopwatch) -> None:
        start(watch)
        strike("forward")

    Stopwatch.start = start_and_strike


def befall(fault: Fault, run: RunDir) -> None:
    """The fault happens."""
    if fault.what == "slow":
        deadline = time.monotonic() + SECONDS
        while read_events(run.events_path, "step")[-1]["step"] < fault.step and time.monotonic() < deadline:
            time.sleep(0.02)
    elif fault.what == "drag":
        time.sleep(0.2)
    elif fault.what == "fail":
        disk.fail()
    elif fault.what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.what == "sleep":
        while True:
            time.sleep(1)
    elif fault.what == "hold":
        re.match(r"(a+)+$", "a" * 60 + "b")  # twice as long for each a
    elif fault.what == "uninterruptible":
        block_in_kernel(run.path / "fifo")
    else:
        peers = [process.pid for process in psutil.Process(os.getppid()).children()]
        disk.kill([os.getpid()] if fault.what == "kill" else peers)


def block_in_kernel(fifo: Path) -> None:
    """Wait for a new process to begin, which waits for someone to write into a pipe."""
    os.mkfifo(fifo)
    os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, str(fifo), os.O_RDONLY, 0)])


if __name__ == "__main__":
    main()
