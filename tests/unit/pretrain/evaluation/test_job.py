"""A job in one process: what it leaves, that it goes on where it was, and that nothing else goes on in its folder."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.evaluation import job as job_module
from pretrain.evaluation.evaluate import Scored
from pretrain.evaluation.job import EvaluationJob, evaluate_job
from pretrain.evaluation.progress import ProgressDisplay
from pretrain.evaluation.record import DocumentScore, read_positions, read_scores
from pretrain.evaluation.texts import texts_config
from tests.conftest import environment
from tests.tiny_hf import TEXTS, tiny_hf_folder

ROOT = Path(__file__).parents[4]
COPIES = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_folder(tmp_path_factory.mktemp("hf"))


def write_lines(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def job(model: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationJob:
    folder = tmp_path_factory.mktemp("data")
    data = [f"a={write_lines(folder / 'a.jsonl', TEXTS * COPIES)}", f"b={write_lines(folder / 'b.jsonl', TEXTS[:1])}"]
    return EvaluationJob(str(model), texts_config(data), window=32, stride=16, batch_tokens=64)


def scores_in(folder: Path) -> dict[int, DocumentScore]:
    scores = list(read_scores(folder))
    assert len({score.index for score in scores}) == len(scores), "a document was recorded twice"
    return {score.index: score for score in scores}


@pytest.fixture(scope="module")
def whole(job: EvaluationJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    evaluate_job(job, folder)
    return folder


def same(found: Path, expected: Path) -> None:
    """Both hold the same documents once, with equal scores."""
    ours, theirs = scores_in(found), scores_in(expected)
    assert ours.keys() == theirs.keys()
    for index, score in theirs.items():
        assert ours[index].nats == pytest.approx(score.nats, rel=1e-6)
        assert replace(ours[index], nats=0.0) == replace(score, nats=0.0)
    for our, their in zip(read_positions(found), read_positions(expected), strict=True):
        assert (our.first, our.last, our.tokens) == (their.first, their.last, their.tokens)
        assert our.nats == pytest.approx(their.nats, rel=1e-6)


def test_a_job_says_what_it_measured(job: EvaluationJob, tmp_path: Path) -> None:
    facts = evaluate_job(
        replace(job, texts=texts_config([str(write_lines(tmp_path / "c.jsonl", TEXTS))])), tmp_path / "o"
    )
    assert (facts.model, facts.step, facts.precision, facts.offload) == (job.model, None, "fp32", None)
    assert (facts.window, facts.stride, facts.start_token, facts.eos_scored) == (32, 16, "bos", True)
    assert facts.domains == ("c",)
    assert facts.notes == ()
    assert facts.cost.ranks == 1
    tokens = sum(score.tokens for score in read_scores(tmp_path / "o"))
    assert facts.cost.tokens_per_second == pytest.approx(tokens / facts.cost.seconds)
    assert 1e7 < facts.cost.peak_memory_bytes < 1e11


def test_a_window_beyond_training_is_noted(job: EvaluationJob, tmp_path: Path) -> None:
    small = replace(job, texts=texts_config([str(write_lines(tmp_path / "c.jsonl", TEXTS))]), batch_tokens=None)
    facts = evaluate_job(replace(small, window=100, stride=None), tmp_path / "long")
    assert facts.notes == ("The window is longer than the 64 tokens that the model was trained to see.",)
    facts = evaluate_job(replace(small, window="document", stride=None), tmp_path / "document")
    assert (facts.window, facts.stride, facts.notes) == ("document", None, ())


def test_domains_in_the_order_of_reading(whole: Path, job: EvaluationJob) -> None:
    assert evaluate_job(job, whole).domains == ("a", "b")
    assert [score.domain for _, score in sorted(scores_in(whole).items())] == ["a"] * len(TEXTS) * COPIES + ["b"]


def test_a_finished_evaluation_runs_no_model(whole: Path, job: EvaluationJob, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    monkeypatch.setattr(job_module, "score_documents", None)
    first = evaluate_job(job, whole)
    assert evaluate_job(replace(job, batch_tokens=4096), whole) == first
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 64}, "window=32, and this one has 64"),
        ({"stride": 8}, "stride=16, and this one has 8"),
        ({"precision": "bf16"}, "precision=fp32, and this one has bf16"),
    ],
)
def test_another_job_does_not_go_on_here(whole: Path, job: EvaluationJob, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_job(replace(job, **change), whole)


def test_changed_text_or_another_model_does_not_go_on_here(job: EvaluationJob, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "c.jsonl", TEXTS)
    small = replace(job, texts=texts_config([str(lines)]))
    evaluate_job(small, tmp_path / "out")
    other = tiny_hf_folder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="holds an evaluation with model="):
        evaluate_job(replace(small, model=str(other)), tmp_path / "out")
    write_lines(lines, [*TEXTS, "more"])
    with pytest.raises(ValueError, match=r"holds an evaluation with files\[0\]\."):
        evaluate_job(small, tmp_path / "out")


def started(job: EvaluationJob, folder: Path) -> "subprocess.Popen[str]":
    """The job in a process of its own, once it has recorded some documents."""
    code = (
        "import sys, pathlib; from pretrain.evaluation import job, record; "
        "record.RecordsWriter.__init__.__defaults__ = (0.05,); "
        "job.evaluate_job(job._JOB.validate_json(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    )
    plain = job_module._JOB.dump_json(job).decode()
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code, plain, str(folder)],
        env={**environment(), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not any(read_scores(folder)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_what_is_scored_when_it_is_stopped_is_not_scored_again(
    job: EvaluationJob, whole: Path, tmp_path: Path, how: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    process = started(job, tmp_path / "out")
    os.kill(process.pid, how)
    process.communicate(timeout=60)
    assert process.returncode != 0
    kept = scores_in(tmp_path / "out")
    assert 0 < len(kept) < len(TEXTS) * COPIES + 1, "it was not stopped in the middle"
    facts = evaluate_job(job, tmp_path / "out")
    assert f"eval: {len(kept)} documents are scored already" in capsys.readouterr().err
    same(tmp_path / "out", whole)
    now = scores_in(tmp_path / "out")
    assert all(now[index] == score for index, score in kept.items())
    assert facts.domains == ("a", "b")


def test_a_job_in_another_precision_is_refused(job: EvaluationJob, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision=fp16: an evaluation runs in fp32 or bf16"):
        evaluate_job(replace(job, precision="fp16"), tmp_path)


def test_progress_in_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    so_far = Scored(tokens=100, bytes=250, documents=3)
    with ProgressDisplay(total_bytes=1000, done_bytes=0, world=2, plain_seconds=0.0) as display:
        display.update(so_far)
    with ProgressDisplay(total_bytes=2000, done_bytes=1000, world=2, plain_seconds=0.0) as display:
        display.started -= 60.0
        display.update(so_far)
    with ProgressDisplay(total_bytes=None, done_bytes=0, world=1, plain_seconds=0.0) as display:
        display.update(so_far)
    for hidden in (ProgressDisplay(1000, 0, 1, shown=False, plain_seconds=0.0), ProgressDisplay(1000, 0, 1)):
        with hidden:
            hidden.update(so_far)
    out, err = capsys.readouterr()
    first, continued, unknown = err.splitlines()
    assert first.startswith("eval: 6 documents, ")
    assert ", 50% of the text, about " in first
    assert ", 75% of the text, about 60 s left" in continued
    assert unknown.startswith("eval: 3 documents, ")
    assert "left" not in unknown
    assert out == ""
