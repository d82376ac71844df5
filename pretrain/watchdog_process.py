"""The process that watches one rank from outside: it waits for beats, and where none comes it says what the rank does,
and ends it.

Started by `pretrain/watchdog.py`. It is outside the process group, so that no collective can hold it up, and outside
the rank's process, so that nothing that holds Python's interpreter lock, and no SIGSTOP, can either. It stays small:
what it needs to report is imported when it does.
"""

import ctypes
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

# What a rank writes and this process reads: beats so far, for how many seconds none may come after the last one, its
# step, its phase.
BEAT = struct.Struct("QdQ32s")
DUMP_SIGNAL = signal.SIGUSR2  # makes a rank write its stacks
PR_SET_PDEATHSIG = 1  # linux/prctl.h

TICKS = 20  # looks at the beats within `hang_seconds`
LONGEST_TICK_SECONDS = 2.0
ASLEEP_SECONDS = 2.0  # a look that comes so late means that this process, too, was stopped or had no processor
DUMP_SECONDS, MOMENT_SECONDS = 1.0, 0.002
# The watchdogs of other ranks, whose beats stopped at about the same time, report before any rank ends: with the first
# that does, the launcher ends all.
PEERS_SECONDS = 5.0


class Watched(NamedTuple):
    """The rank, and where to find and to say things. beats, stacks: open files; `stacks` is where the rank dumps.

    main_thread: the identifier of its main thread in that dump. stacks_path, error_path: what is written of a hang.
    """

    process: int
    main_thread: int
    world: int
    hang_seconds: float
    beats: int
    stacks: int
    stacks_path: str
    error_path: str

    def words(self) -> list[str]:
        """As arguments of a command."""
        return [str(field) for field in self]

    @classmethod
    def of(cls, words: list[str]) -> "Watched":
        """The inverse of `words`."""
        process, main_thread, world, seconds, beats, stacks, *paths = words
        return cls(int(process), int(main_thread), int(world), float(seconds), int(beats), int(stacks), *paths)


class Beat(NamedTuple):
    """The last one: its number, for how long none may come after it, and for how long none has."""

    number: int
    patience_seconds: float
    step: int
    phase: str
    quiet_seconds: float


def main() -> None:
    """Watch until the rank has ended or has been ended."""
    watched = Watched.of(sys.argv[1:])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with mmap.mmap(watched.beats, BEAT.size, prot=mmap.PROT_READ) as memory:
        overdue = -1  # the number of a beat after which none came in time, at the look before
        for beat in beats(watched, memory):
            late = beat.quiet_seconds >= beat.patience_seconds
            if late and beat.number == overdue and end(watched, beat, memory):
                return
            overdue = beat.number if late else -1


def beats(watched: Watched, memory: mmap.mmap) -> Iterator[Beat]:
    """The last beat, again and again while the rank lives.

    Only time in which this process was awake counts: a job that is suspended and goes on did not hang.
    """
    tick = min(LONGEST_TICK_SECONDS, watched.hang_seconds / TICKS)
    seen, quiet, before = -1, 0.0, time.monotonic()
    while os.getppid() == watched.process:
        number, patience_seconds, step, phase = BEAT.unpack(memory)
        now = time.monotonic()
        quiet += now - before if now - before < tick + ASLEEP_SECONDS else tick
        before = now
        if number != seen:
            seen, quiet = number, 0.0
        yield Beat(number, patience_seconds, step, phase.rstrip(b"\0").decode(), quiet)
        time.sleep(tick)


def end(watched: Watched, beat: Beat, memory: mmap.mmap) -> bool:
    """Report, within a time that no file system can prolong, let the others report, and end the rank; unless it beats
    again meanwhile. Returns whether it was ended."""
    began = time.monotonic()
    reporter = threading.Thread(target=report, args=(watched, beat), daemon=True)
    reporter.start()
    reporter.join(PEERS_SECONDS + 2 * DUMP_SECONDS)
    time.sleep(max(0.0, began + PEERS_SECONDS - time.monotonic()))
    if BEAT.unpack(memory)[0] != beat.number:
        for path in (watched.error_path, watched.stacks_path):
            if os.path.exists(path):
                os.remove(path)
        return False
    os.kill(watched.process, signal.SIGKILL)
    return True


def report(watched: Watched, beat: Beat) -> None:
    """Write what the rank does.

    It is written before the stacks are there, too: to walk through the stacks of a process that runs may end it.
    """
    state = state_of(watched.process)
    write(watched, beat, state)
    ask_for_stacks(watched.process)
    if state == "T":
        time.sleep(PEERS_SECONDS - DUMP_SECONDS)  # the others do not take for progress what it does now
    write(watched, beat, state, dumped(watched, state == "T"))


def write(watched: Watched, beat: Beat, state: str, stacks: str = "") -> None:
    """The rank's error, and its stacks with what the kernel says of its threads."""
    from dataclasses import asdict
    from pathlib import Path

    from pretrain.hang import HANG, Report, call_in
    from pretrain.outcome import EXIT_FAILED
    from pretrain.run_dir import write_json

    call, waiting = call_in(stacks, watched.main_thread, Path(__file__).resolve().parents[1])
    said = Report(os.uname().nodename, beat.step, beat.phase, state, beat.quiet_seconds, watched.world, waiting, call)
    threads = "".join(f"  {line}\n" for line in threads_of(watched.process))
    text = f"process {watched.process} on {said.host}: {said}\n\n{stacks or 'no stacks: it does not answer'}\n"
    Path(watched.stacks_path).write_text(f"{text}\nits threads, as the kernel sees them:\n{threads}", encoding="utf-8")
    error = {"exit_code": EXIT_FAILED, "type": HANG, "message": str(said), **asdict(said)}
    write_json(Path(watched.error_path), error)


def ask_for_stacks(process: int) -> None:
    """Signal the main thread, so that it writes the stacks before it goes on; before glibc 2.30, any thread."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "tgkill"):
        libc.tgkill(process, process, DUMP_SIGNAL)
    else:
        os.kill(process, DUMP_SIGNAL)


def dumped(watched: Watched, stopped: bool) -> str:
    """What the rank has written of its stacks, when it writes no more or has had its time.

    A stopped one is let go on for moments, in which it writes its stacks before it does anything else.
    """
    size, deadline = 0, time.monotonic() + DUMP_SECONDS
    while time.monotonic() < deadline:
        if stopped:
            os.kill(watched.process, signal.SIGCONT)
            time.sleep(MOMENT_SECONDS)
            os.kill(watched.process, signal.SIGSTOP)
        time.sleep(DUMP_SECONDS / TICKS)
        before, size = size, os.fstat(watched.stacks).st_size
        if 0 < size == before:
            break
    return os.pread(watched.stacks, size, 0).decode(errors="replace")


def state_of(process: int) -> str:
    """The letter of a process's state: that of its main thread."""
    with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[0]


def threads_of(process: int) -> Iterator[str]:
    """Each thread's number, name, state and the function of the kernel that it waits in, where that may be known."""
    for thread in sorted(os.listdir(f"/proc/{process}/task"), key=int):
        try:
            folder = f"/proc/{process}/task/{thread}"
            with open(f"{folder}/comm", encoding="utf-8", errors="replace") as comm, open(f"{folder}/wchan") as wchan:
                yield f"{thread} {comm.read().strip()}: {state_of(int(thread))} {wchan.read().strip('0')}".rstrip()
        except OSError:  # it has ended meanwhile
            continue
