"""Which logs a run has, their last lines, and following them over restarts."""

import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.cluster import logs
from launch.cluster.logs import last_lines, log_files, missing_log, read_on
from pretrain.run_dir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.logs.mkdir(parents=True)
    return run


def test_job_logs_come_by_the_number_of_the_job(run: RunDir) -> None:
    for name in ("job_10.log", "job_9.log", "job_x.log", "rank_00000.log", "rank_00011.log"):
        (run.logs / name).write_text("")
    assert [path.name for path in log_files(run, None)] == ["job_9.log", "job_10.log"]
    assert [path.name for path in log_files(run, 11)] == ["rank_00011.log"]
    assert log_files(run, 3) == []
    assert "--rank 3: " in str(missing_log(run, 3))
    assert "there are ranks 0 to 11" in str(missing_log(run, 3))


def test_a_local_run_has_the_first_ranks(run: RunDir) -> None:
    assert log_files(run, None) == []
    assert "has no logs yet" in str(missing_log(run, None))
    run.rank_log(0).write_text("")
    assert log_files(run, None) == [run.rank_log(0)]


@settings(max_examples=200)
@given(
    st.lists(st.text("ab\n", max_size=12), min_size=1, max_size=3), st.integers(0, 9), st.sampled_from((1, 3, 1 << 16))
)
def test_last_lines(texts: list[str], count: int, block_bytes: int) -> None:
    """As if all files were one, but that each begins a line of its own."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "BLOCK_BYTES", block_bytes)
        files = [Path(folder, str(i)) for i in range(len(texts))]
        for path, text in zip(files, texts, strict=True):
            path.write_text(text)
        found = [line for path, start in last_lines(files, count) for line in path.read_text()[start:].splitlines()]
    lines = [line for text in texts for line in text.splitlines()]
    assert found == (lines[-count:] if count else lines)


def test_following_goes_on_in_the_log_of_the_next_job(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(logs, "STATE_SECONDS", 0.02)
    first, second, over = run.logs / "job_1.log", run.logs / "job_2.log", threading.Event()
    old = run.logs / "job_0.log"
    old.write_text("old\n")
    first.write_text("a\n")

    def goes_on() -> None:
        for path, text in ((first, "b\n"), (second, "c\n"), (first, "late\n"), (second, "d\n")):
            time.sleep(0.05)
            with open(path, "a") as file:
                file.write(text)
        over.set()

    writer = threading.Thread(target=goes_on)
    writer.start()
    pieces = list(read_on(lambda: log_files(run, None), [(first, 0)], over.is_set))
    writer.join()
    told = {path: b"".join(piece for where, piece in pieces if where == path) for path, _ in pieces}
    assert told == {first: b"a\nb\nlate\n", second: b"c\nd\n"}
