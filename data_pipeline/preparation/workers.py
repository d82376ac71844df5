"""Who does the tasks of a phase: this process, or several of this machine, beside any others that do the same.

A worker takes one task after another that is neither done nor taken, and ends when all are done, whoever did them.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from data_pipeline.preparation.memory import available_bytes
from data_pipeline.preparation.phase import Job, OnBytes, Phase
from data_pipeline.preparation.work_folder import WorkFolder

LOOK_SECONDS = 0.5
"""Between two looks at what others have done."""
PROCESS_BYTES = 4 << 20
"""A process takes a second or two to start, in which so many bytes are nearly done."""
WORKER_BYTES = 256 << 20
"""Memory that a worker takes in any phase."""
LEAVE_SECONDS = 10.0
"""Workers that were told to stop have so long to do it themselves."""


@dataclass(frozen=True)
class Progress:
    """How far the current phase is, over all workers of this machine and the finished tasks of all others."""

    phase: str
    done_bytes: int
    total_bytes: int | None
    """None where a store or a hub dataset does not say."""


OnProgress = Callable[[Progress], None]


def work_through(phase: Phase, workers: int, progress: OnProgress) -> None:
    """Take part in a phase until all of its tasks are done.

    Raises:
        ValueError, OSError: as a task does; or a worker died. What was finished is kept.
    """
    meter = _Meter(phase, progress)
    pending = meter.look()
    worth = 1 + sum(PROCESS_BYTES if size is None else size for size in pending) // PROCESS_BYTES
    processes = min(workers, len(pending), worth, _room(phase))
    if processes > 1:
        _Crew(phase, processes, workers // processes, meter).run()
    elif pending:
        do_tasks(phase, workers, meter.reach)
    meter.look()


def _room(phase: Phase) -> int:
    """For how many workers of a phase this machine has memory."""
    needed = phase.worker_bytes()
    return max(1, available_bytes() // (needed + WORKER_BYTES)) if needed else sys.maxsize


def do_tasks(phase: Phase, threads: int, reached: Callable[[int], None]) -> None:
    """Do what there is to do until nothing is left; `reached` is told the bytes done of the task at hand."""
    work = phase.job.work
    pending = list(range(len(phase.sizes())))
    while True:
        done = work.tasks_done()
        pending = [task for task in pending if phase.task_name(task) not in done]
        if not pending:
            return
        tried = [_try_task(phase, task, threads, reached) for task in pending]
        if not any(tried):
            # What others have taken may come back, if they die.
            reached(0)
            time.sleep(LOOK_SECONDS)


def _try_task(phase: Phase, task: int, threads: int, reached: Callable[[int], None]) -> bool:
    """Whether the task could be taken."""
    work, name = phase.job.work, phase.task_name(task)
    with work.claimed(name) as claim:
        if claim is None:
            return False
        if not claim.is_done:
            claim.finish(phase.do(task, threads, _adding_up(reached)))
        claim.announce()
        reached(0)
        return True


def _adding_up(reached: Callable[[int], None]) -> OnBytes:
    total = 0

    def on_bytes(count: int) -> None:
        nonlocal total
        total += count
        reached(total)

    return on_bytes


class _Meter:
    """Adds up what is done: the finished tasks, whoever did them, and what this machine has begun."""

    def __init__(self, phase: Phase, progress: OnProgress) -> None:
        self._phase = phase
        self._progress = progress
        self._sizes = phase.sizes()
        known = [size for size in self._sizes if size is not None]
        self._total_bytes = sum(known) if len(known) == len(self._sizes) else None
        self._done_bytes = self._told_bytes = 0
        self._looked = 0.0

    def look(self) -> list[int | None]:
        """Count what is done anew; the sizes of the tasks that are not."""
        done = self._phase.job.work.tasks_done()
        self._looked = time.monotonic()
        sizes = [(size, self._phase.task_name(task) in done) for task, size in enumerate(self._sizes)]
        self._done_bytes = sum(size or 0 for size, is_done in sizes if is_done)
        self._tell(self._done_bytes)
        return [size for size, is_done in sizes if not is_done]

    def reach(self, begun_bytes: int) -> None:
        """So many bytes are done of tasks that are not finished."""
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self.look()
        self._tell(self._done_bytes + begun_bytes)

    def _tell(self, done_bytes: int) -> None:
        # What is finished may be counted twice for a moment, or not at all.
        self._told_bytes = max(self._told_bytes, done_bytes)
        if self._total_bytes is not None:
            self._told_bytes = min(self._told_bytes, self._total_bytes)
        self._progress(Progress(self._phase.name, self._told_bytes, self._total_bytes))


class _Crew:
    """Worker processes, each of which reports through a pipe how it ended."""

    def __init__(self, phase: Phase, processes: int, threads: int, meter: _Meter) -> None:
        # Not forked: threads of libraries would not come along, but their locks.
        context = multiprocessing.get_context("spawn")
        self._meter = meter
        self._begun = context.RawArray("q", processes)
        self._stop = context.Event()
        self._workers: dict[Connection, BaseProcess] = {}
        job = phase.job
        for slot in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            words = (job.out, job.tokenizer_path, type(phase), threads, slot, self._begun, self._stop, sender)
            process = context.Process(target=_worker, args=words, name=f"prepare-{slot}", daemon=True)
            process.start()
            # Else the pipe of a worker that died would not end.
            sender.close()
            self._workers[receiver] = process

    def run(self) -> None:
        """Wait for all; the first error that one of them meets stops the others."""
        try:
            running = dict(self._workers)
            while running:
                for receiver in wait(list(running), timeout=LOOK_SECONDS):
                    assert isinstance(receiver, Connection)
                    _raise_what_it_met(receiver, running.pop(receiver))
                self._meter.reach(sum(self._begun))
        finally:
            self._end()

    def _end(self) -> None:
        self._stop.set()
        deadline = time.monotonic() + LEAVE_SECONDS
        for receiver, process in self._workers.items():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            receiver.close()


def _raise_what_it_met(receiver: Connection, process: BaseProcess) -> None:
    try:
        error = pickle.loads(receiver.recv_bytes())
    except EOFError:
        process.join()
        code = process.exitcode or 0
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise OSError(
            f"a worker {ended}, as happens where memory is short: what was finished is kept; run the same command "
            "again to continue, if need be with fewer --workers"
        ) from None
    if error is not None:
        raise error


class _Stopped(Exception):  # noqa: N818
    """This worker was told to stop."""


def _worker(
    out: Path,
    tokenizer_path: str,
    phase_type: type[Phase],
    threads: int,
    slot: int,
    begun: Any,
    stop: Any,
    sender: Connection,
) -> None:
    """What a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a person's Ctrl-C reaches all; the first process decides
    parent = os.getppid()

    def reached(done_bytes: int) -> None:
        if os.getppid() != parent:
            os._exit(1)  # nobody would hear how this goes on
        if stop.is_set():
            raise _Stopped
        begun[slot] = done_bytes

    error: Exception | None = None
    try:
        with WorkFolder(out).working():
            do_tasks(phase_type(Job.opened(out, tokenizer_path)), threads, reached)
    except _Stopped:
        pass
    except Exception as met:
        error = met
    with contextlib.suppress(BrokenPipeError):  # the first process has died
        sender.send_bytes(_pickled(error))


def _pickled(error: Exception | None) -> bytes:
    """An error as the first process can raise it. Some libraries' cannot be taken apart and put together again."""
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:
        content = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return content
