"""Two runs that want the same folder: one trains, the other is refused, and nothing is mixed up."""

import subprocess
from pathlib import Path

import pytest

from pretrain.run_dir import read_events
from tests.conftest import Corpus, command, environment
from tests.dist.test_bad_input import one_line
from tests.dist.test_run import curve

pytestmark = pytest.mark.slow


def both(*words: object) -> tuple[str, str]:
    """Run the same command twice at the same time; returns what the one that trained and the one that was refused said
    on stderr."""
    pair = [subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True, env=environment()) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in pair]
    by_code = {process.returncode: text for process, text in zip(pair, said, strict=True)}
    assert set(by_code) == {0, 2}, said
    return by_code[0], by_code[2]


def test_two_runs_started_in_one_folder(undisturbed: Path, corpus: Corpus, tmp_path: Path) -> None:
    """Started anew at the same moment, and resumed at the same moment."""
    run = tmp_path / "run"
    _, refused = both("train", "58m", "--nproc", 2, "--run-dir", run, *corpus.settings(), "--stop-after", 3)
    assert any(words in one_line(refused) for words in ("is being trained in", "exists and is not empty"))
    assert curve(run) == curve(undisturbed)[:3]
    _, refused = both("resume", run)
    assert f"{run} is being trained in by another process: wait for it, or stop it" in one_line(refused)
    assert curve(run) == curve(undisturbed)
    assert len(read_events(run / "events.jsonl", "start")) == 2
    assert [event["step"] for event in read_events(run / "events.jsonl", "step")] == list(range(1, 13))
