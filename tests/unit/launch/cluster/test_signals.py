"""Signals between the supervisor and rank 0."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cluster.rank import pid_path
from launch.cluster.signals import Told, ask_rank_0, catches
from pretrain.run_dir import RunDir

LISTENS = (
    "import signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7)); print(1, flush=True); signal.pause()"
)
DEAF = "import signal; print(1, flush=True); signal.pause()"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    run.logs.mkdir()
    return run


def started(run: RunDir, code: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    pid_path(run).write_text(f"n1 {process.pid}\n")
    return process


@pytest.fixture
def restored_handlers() -> Iterator[None]:
    numbers = (signal.SIGUSR1, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_rank_0_is_asked(run: RunDir) -> None:
    with started(run, LISTENS) as process:
        assert catches(process.pid, signal.SIGUSR1)
        assert ask_rank_0(run, "n1")
        assert process.wait(20) == 7
    assert not catches(process.pid, signal.SIGUSR1), "it is gone"
    assert ask_rank_0(run, "n1"), "and to ask it again is no error"


def test_a_rank_that_does_not_listen_yet_is_let_be(run: RunDir) -> None:
    assert ask_rank_0(run, "n1"), "it has not said who it is"
    with started(run, DEAF) as process:
        assert ask_rank_0(run, "n1")
        assert process.poll() is None
        process.kill()
        assert process.wait(20) == -signal.SIGKILL


def test_a_rank_on_another_node_is_out_of_reach(run: RunDir) -> None:
    with started(run, LISTENS) as process:
        assert not ask_rank_0(run, "n2")
        assert process.poll() is None
        process.kill()


@pytest.mark.usefixtures("restored_handlers")
def test_the_supervisor_only_notes_what_it_is_told() -> None:
    told = Told()
    told.listen()
    os.kill(os.getpid(), signal.SIGUSR1)
    first = told.usr1_at
    assert first is not None
    assert not told.term
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert told == Told(first, term=True)
