"""`steppe eval --nproc 2`: two real ranks say what one says, and a user's mistake stays one."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from launch.ranks import run_ranks
from pretrain.evaluation import job as job_module
from pretrain.evaluation.folder import FACTS_NAME
from pretrain.evaluation.job import EvaluationJob, evaluate_job
from pretrain.evaluation.record import DocumentScore, read_positions, read_scores
from pretrain.evaluation.texts import texts_config
from tests.conftest import environment
from tests.tiny_hf import TEXTS, tiny_hf_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> EvaluationJob:
    folder = tmp_path_factory.mktemp("eval")
    for name, texts in (("a", TEXTS * 3), ("b", TEXTS[1:2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = texts_config([f"{name}={folder / name}.jsonl" for name in ("a", "b")])
    return EvaluationJob(str(tiny_hf_folder(folder / "hf")), config, window=32, stride=8, batch_tokens=128)


def scores_in(folder: Path) -> list[DocumentScore]:
    return sorted(read_scores(folder), key=lambda score: score.index)


@pytest.mark.slow
def test_two_ranks_equal_one_and_go_on_where_it_was(job: EvaluationJob, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    facts = evaluate_job(job, alone)
    # What two ranks go on from: some documents of a sitting of one rank that never came to its end.
    evaluate_job(job, together)
    (together / FACTS_NAME).unlink()
    records = together / "records" / "rank_00000.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join([*lines[:4], '{"positions": {"0": [4, 1.0]}}\n', *lines[4:9]]))
    kept = {score.index for score in read_scores(together)}
    assert len(kept) == 4
    shared = evaluate_job(job, together, 2, run_ranks)
    assert replace(shared, cost=facts.cost) == facts
    assert shared.cost.ranks == 2
    for expected, found in zip(scores_in(alone), scores_in(together), strict=True):
        assert found.nats == pytest.approx(expected.nats, rel=1e-6)
        assert replace(found, nats=0.0) == replace(expected, nats=0.0)
    assert (together / "records" / "rank_00001.jsonl").stat().st_size > 0
    tokens = sum(score.tokens for score in read_scores(alone))
    assert sum(position.tokens for position in read_positions(alone)) == tokens
    assert evaluate_job(job, together, 2, run_ranks) == shared


@pytest.mark.slow
def test_a_mistake_on_a_rank_is_told_by_the_parent(job: EvaluationJob, tmp_path: Path) -> None:
    # Ranks find out while they read, when the model is loaded and the other rank may be at work.
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(json.dumps({"text": TEXTS[1]}).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"broken.jsonl:2: invalid UTF-8"):
        evaluate_job(replace(job, texts=texts_config([str(broken)])), tmp_path / "out", 2, run_ranks)


@pytest.mark.slow
def test_the_launchers_death_ends_the_ranks(job: EvaluationJob, tmp_path: Path) -> None:
    """They would go on writing to the folder, whose lock is free for others."""
    (tmp_path / "long.jsonl").write_text((json.dumps({"text": TEXTS[1]}) + "\n") * 20_000)
    long = replace(job, texts=texts_config([str(tmp_path / "long.jsonl")]))
    code = (
        "import sys, pathlib; from launch.ranks import run_ranks; from pretrain.evaluation import job; "
        "job.evaluate_job(job._JOB.validate_json(sys.argv[1]), pathlib.Path(sys.argv[2]), 2, run_ranks)"
    )
    words = [sys.executable, "-P", "-c", code, job_module._JOB.dump_json(long).decode(), str(tmp_path / "out")]
    launcher = subprocess.Popen(words, env={**environment(), "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "records" / "rank_00001.jsonl").is_file():
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks = psutil.Process(launcher.pid).children()
    assert len(ranks) == 2
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=5)
    for rank in alive:
        rank.kill()
    assert not alive
    assert not (tmp_path / "out" / FACTS_NAME).is_file()
