"""A rank's side of its watchdog: it beats, and writes its stacks when asked; `pretrain/watchdog_process.py` watches."""

import faulthandler
import mmap
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from pretrain.run_dir import RunDir
from pretrain.watchdog_process import BEAT, DUMP_SIGNAL, Watched

# What a launcher, a scheduler or a terminal sends to all of a job's processes. The watchdog's life is its rank's.
FOR_THE_RANK = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
# What a rank has at the least until its first step is made: to import, load, and compile.
START_SECONDS = 1800.0


class Watchdog:
    """Ends this rank by SIGKILL, with a word in `logs/`, when it does not beat for `hang_seconds` (0: never).

    Until its first step is made it has START_SECONDS, if they are more: how long a start takes says nothing of a step.
    To be made once, by the main thread, before the heavy imports, which may hang too (a file system that does not
    answer). It is there until the process ends. Whatever lasts longer than `hang_seconds` by nature has to beat: a beat
    costs a microsecond and is no system call.
    """

    def __init__(self, run_dir: RunDir, rank: int, hang_seconds: float) -> None:
        self._beats = self._steps = 0
        self._hang_seconds = hang_seconds
        self._file = open(os.memfd_create("steppe-beats"), "r+b")  # noqa: SIM115 no disk, which may be full
        self._file.truncate(BEAT.size)
        self._memory = mmap.mmap(self._file.fileno(), BEAT.size)
        self.beat(0, "starting")
        self._child = self._started(run_dir, rank, hang_seconds) if hang_seconds else None

    @property
    def process(self) -> int | None:
        """The number of the process that watches, if one does."""
        return None if self._child is None else self._child.pid

    def beat(self, step: int, phase: str, patience_seconds: float = 0.0) -> None:
        """A sign of life. step: the one under way. phase: what is done in it, in a word of up to 32 bytes; "step" as it
        begins. patience_seconds: for how long the next may take to come, if that is more than `hang_seconds`."""
        self._steps += phase == "step"
        least = patience_seconds if self._steps > 1 else START_SECONDS
        self._last = (max(self._hang_seconds, least), step, phase.encode())
        self.alive()

    def alive(self) -> None:
        """The same again: what the last one said goes on. From any thread."""
        self._beats += 1
        # Packed beside and copied at once: packing in place zeroes the memory first, where the other side may look.
        self._memory[:] = BEAT.pack(self._beats, *self._last)

    def _started(self, run_dir: RunDir, rank: int, hang_seconds: float) -> "subprocess.Popen[bytes]":
        self._stacks = open(os.memfd_create("steppe-stacks"), "r+b")  # noqa: SIM115
        # Written by a handler in C, whatever Python does.
        faulthandler.register(DUMP_SIGNAL, self._stacks, all_threads=True)
        watched = Watched(
            process=os.getpid(),
            main_thread=threading.get_ident(),
            world=int(os.environ.get("WORLD_SIZE", "1")),
            hang_seconds=hang_seconds,
            beats=self._file.fileno(),
            stacks=self._stacks.fileno(),
            stacks_path=str(run_dir.rank_stacks(rank)),
            error_path=str(run_dir.rank_error(rank)),
        )
        # Our packages come last on its path, and nothing else but Python's own library: it starts in a moment.
        root = str(Path(__file__).resolve().parents[1])
        program = f"import sys; sys.path.append({root!r}); from pretrain.watchdog_process import main; main()"
        before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_RANK)  # which a new process inherits
        try:
            return subprocess.Popen(
                [sys.executable, "-P", "-S", "-c", program, *watched.words()],
                stdin=subprocess.DEVNULL,
                pass_fds=(watched.beats, watched.stacks),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
