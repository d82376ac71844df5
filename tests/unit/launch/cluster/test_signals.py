"""Signals between the supervisor and rank 0."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cluster.rank import pid_path, write_pid
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
    pid_path(run).write_text(f"{process.pid}\n")
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
        ask_rank_0(run)
        assert process.wait(20) == 7
    assert not catches(process.pid, signal.SIGUSR1), "it is gone"
    ask_rank_0(run)  # and to ask it again is no error


def test_a_rank_that_does_not_listen_yet_is_let_be(run: RunDir) -> None:
    ask_rank_0(run)  # it has not said who it is
    with started(run, DEAF) as process:
        ask_rank_0(run)
        time.sleep(0.2)
        assert process.poll() is None
        process.kill()
        assert process.wait(20) == -signal.SIGKILL


@pytest.mark.parametrize("text", ["", "n1", "12 34"])
def test_a_rank_that_is_about_to_say_who_it_is(run: RunDir, text: str) -> None:
    """As a file system shows it that has made the file and not yet filled it."""
    pid_path(run).write_text(text)
    ask_rank_0(run)


def test_a_rank_says_who_it_is_at_once(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    replace = os.replace

    def replaced(source: Path, target: Path) -> None:
        seen.append((Path(source).read_text(), Path(target).exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replaced)
    write_pid(run)
    assert seen == [(f"{os.getpid()}\n", False)]
    assert pid_path(run).read_text() == f"{os.getpid()}\n"


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
