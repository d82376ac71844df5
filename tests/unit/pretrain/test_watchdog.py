"""The watchdog of a rank, with real processes: what it costs, when it strikes, what it leaves, and that it goes."""

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from pretrain.hang import HANG
from pretrain.run_dir import RunDir, read_json
from pretrain.watchdog import Watchdog
from pretrain.watchdog_process import BEAT, DUMP_SECONDS, PEERS_SECONDS, Watched
from tests.dist.harness import ROOT

HANG_SECONDS = 1.0
LATEST_SECONDS = HANG_SECONDS + PEERS_SECONDS + 2 * DUMP_SECONDS + 5  # the last for a busy machine

# What a rank does: it says the number of its watchdog's process, beats until it is told to go on, and then hangs.
RANK = """
import os, re, signal, sys, time
from pathlib import Path
from pretrain.run_dir import RunDir
from pretrain.watchdog import Watchdog

run = RunDir(Path(sys.argv[1]))
watchdog = Watchdog(run, 3, float(sys.argv[2]))
print(watchdog.process, flush=True)
while not (run.path / "hang").exists():
    watchdog.beat(7, "step")
    time.sleep(0.4)

def train_step():
    HOW

train_step()
"""
HANGS = {
    "sleep": "time.sleep(1000)",
    "stop": "os.kill(os.getpid(), signal.SIGSTOP); time.sleep(1000)",
    "hold": "re.match(r'(a+)+$', 'a' * 60 + 'b')",
    "uninterruptible": "os.mkfifo(run.path / 'fifo'); os.posix_spawn('/bin/true', ['true'], {}, "
    "file_actions=[(os.POSIX_SPAWN_OPEN, 0, str(run.path / 'fifo'), os.O_RDONLY, 0)])",
    # Something that the report cannot get past.
    "disk": "os.mkfifo(run.rank_stacks(3)); time.sleep(1000)",
    "end": "pass",
}


BUSY = """
from pathlib import Path
from pretrain.run_dir import RunDir
from pretrain.watchdog import Watchdog

watchdog = Watchdog(RunDir(Path(".")), 3, 0.0)
print(watchdog._file.fileno(), flush=True)
while True:
    watchdog.beat(7, "step")
"""


def test_a_beat_is_never_seen_half_written() -> None:
    """Whenever the other process looks, at a rank that beats without pause."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-P", "-c", BUSY], stdout=subprocess.PIPE, text=True, env=env) as busy:
        try:
            assert busy.stdout is not None
            with open(f"/proc/{busy.pid}/fd/{int(busy.stdout.readline())}", "rb") as file:
                memory = mmap.mmap(file.fileno(), BEAT.size, prot=mmap.PROT_READ)
            await_true(lambda: BEAT.unpack(memory)[2] == 7)
            seen, until = set(), time.monotonic() + 2
            while time.monotonic() < until:
                number, *rest = BEAT.unpack(memory)
                seen.add((number > 0, *rest))
        finally:
            busy.kill()
    assert seen == {(True, 0.0, 7, b"step".ljust(32, b"\0"))}


@contextmanager
def rank(folder: Path, how: str, hang_seconds: float = HANG_SECONDS) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A rank that will hang, in a process group of its own, and the number of its watchdog's process."""
    run = RunDir(folder)
    run.logs.mkdir(parents=True)
    words = [sys.executable, "-P", "-c", RANK.replace("HOW", HANGS[how]), str(folder), str(hang_seconds)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "4"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True)
    try:
        assert process.stdout is not None
        watchdog = int(process.stdout.readline())
        await_true(lambda: "pretrain.watchdog_process" in " ".join(psutil.Process(watchdog).cmdline()))
        yield process, watchdog
    finally:
        process.kill()
        process.communicate()


def await_true(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(process: int) -> bool:
    """Ended, whether or not someone has taken note."""
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.slow
def test_every_kind_of_hang(tmp_path: Path) -> None:
    """All at once, as each takes seconds: found, told with what can be told, and ended in time."""
    kinds = [kind for kind in HANGS if kind != "end"]
    with_ranks = [rank(tmp_path / kind, kind) for kind in kinds]
    started = [context.__enter__() for context in with_ranks]
    try:
        time.sleep(1.5 * HANG_SECONDS)  # while they beat, nothing befalls them
        assert [process.poll() for process, _ in started] == [None] * len(kinds)
        for kind in kinds:
            (tmp_path / kind / "hang").touch()
        began = time.monotonic()
        for process, watchdog in started:
            assert process.wait(LATEST_SECONDS) == -signal.SIGKILL
            await_true(lambda watchdog=watchdog: gone(watchdog))  # type: ignore[misc]
        assert HANG_SECONDS + PEERS_SECONDS <= time.monotonic() - began < LATEST_SECONDS
    finally:
        fifo = tmp_path / "uninterruptible" / "fifo"
        if fifo.exists():
            os.close(os.open(fifo, os.O_RDWR))  # what was to begin begins, and ends
        for context in with_ranks:
            context.__exit__(None, None, None)

    found = {kind: said(tmp_path / kind) for kind in kinds if kind != "disk"}
    assert not RunDir(tmp_path / "disk").rank_error(3).exists()
    for kind, (error, stacks) in found.items():
        assert (error["exit_code"], error["type"], error["world"]) == (1, HANG, 4)
        assert (error["step"], error["phase"], error["waiting"]) == (7, "step", None)
        assert HANG_SECONDS * 0.9 < error["seconds"] < LATEST_SECONDS
        assert ("in train_step" in stacks) == (kind != "uninterruptible"), stacks
    states = {kind: error["state"] for kind, (error, _) in found.items()}
    assert states == {"sleep": "S", "stop": "T", "hold": "R", "uninterruptible": "D"}
    assert "in match" in found["hold"][1]
    assert "no stacks: it does not answer" in found["uninterruptible"][1]
    assert ": T do_signal_stop" in found["stop"][1]


def said(folder: Path) -> tuple[dict[str, Any], str]:
    """(error, stacks)"""
    return read_json(RunDir(folder).rank_error(3)), RunDir(folder).rank_stacks(3).read_text()


@pytest.mark.slow
def test_a_start_has_its_time(tmp_path: Path) -> None:
    """No beat of a step yet, or only that of the first, which may have to be compiled."""
    program = "import sys, time; from pathlib import Path; from pretrain.run_dir import RunDir\n"
    program += "from pretrain.watchdog import Watchdog; watchdog = Watchdog(RunDir(Path(sys.argv[1])), 0, 0.2)\n"
    program += "time.sleep(1); watchdog.beat(1, 'step'); time.sleep(1); watchdog.beat(2, 'step'); time.sleep(100)"
    (tmp_path / "logs").mkdir()
    words = [sys.executable, "-P", "-c", program, str(tmp_path)]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert read_json(RunDir(tmp_path).rank_error(0))["step"] == 2


@pytest.mark.slow
def test_a_job_that_is_suspended_does_not_hang(tmp_path: Path) -> None:
    """Slurm suspends a job by SIGSTOP to all of its processes. The watchdog may be the first that goes on."""
    with rank(tmp_path / "run", "end") as (process, watchdog):
        time.sleep(HANG_SECONDS)  # its start is over
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(3 * HANG_SECONDS)
        os.kill(watchdog, signal.SIGCONT)
        time.sleep(0.3 * HANG_SECONDS)
        os.killpg(process.pid, signal.SIGCONT)
        time.sleep(1.5 * HANG_SECONDS)
        assert process.poll() is None
        (tmp_path / "run" / "hang").touch()
        assert process.wait(10) == 0
    assert not list((tmp_path / "run" / "logs").iterdir())


@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_it_goes_with_its_rank(tmp_path: Path, how: str) -> None:
    with rank(tmp_path / "run", "end", hang_seconds=1000) as (process, watchdog):
        if how == "ends":
            (tmp_path / "run" / "hang").touch()
        else:
            process.kill()
        await_true(lambda: gone(watchdog))


def test_what_asks_the_rank_to_stop_does_not_stop_it(tmp_path: Path) -> None:
    """Slurm and terminals signal all of a job's processes."""
    with rank(tmp_path / "run", "end", hang_seconds=1000) as (process, watchdog):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            os.kill(watchdog, number)
        time.sleep(0.3)
        assert not gone(watchdog)
        assert process.poll() is None


def test_it_is_small_and_beats_are_cheap(tmp_path: Path) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    watchdog = Watchdog(RunDir(tmp_path), 0, 1000)
    assert watchdog.process is not None
    try:
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
        began = time.thread_time()
        for step in range(10_000):
            watchdog.beat(step, "step")
        assert (time.thread_time() - began) / 10_000 < 20e-6
        process = psutil.Process(watchdog.process)
        await_true(lambda: any("ctypes" in path.path for path in process.memory_maps()))  # the last that it imports
        assert process.memory_info().rss < 30e6
        assert not any("torch" in path.path for path in process.memory_maps())
    finally:
        os.kill(watchdog.process, signal.SIGKILL)
        os.waitpid(watchdog.process, 0)


def test_none_where_none_is_wanted(tmp_path: Path) -> None:
    watchdog = Watchdog(RunDir(tmp_path), 0, 0)
    watchdog.beat(1, "step")
    assert watchdog.process is None


def test_what_it_is_told_arrives() -> None:
    watched = Watched(1, 2, 4, 0.5, 5, 6, "/a folder/stacks", "/error")
    assert Watched.of(watched.words()) == watched
