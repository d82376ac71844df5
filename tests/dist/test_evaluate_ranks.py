"""`steppe eval --nproc 2`: two real ranks say what one says, and a user's mistake stays one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch.ranks import run_ranks
from pretrain.evaluation.job import EvaluationJob, run_job, run_job_on_ranks, survey
from tests.tiny_hf import TEXTS, tiny_hf_folder


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> EvaluationJob:
    folder = tmp_path_factory.mktemp("eval")
    for name, texts in (("a", TEXTS * 3), ("b", TEXTS[1:2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {name: str(folder / f"{name}.jsonl") for name in ("a", "b")}
    model = tiny_hf_folder(folder / "hf")
    return EvaluationJob(str(model), data, window=32, stride=8, batch_tokens=128, total_bytes=survey(data, "text"))


@pytest.mark.slow
def test_two_ranks_equal_one(job: EvaluationJob) -> None:
    alone, together = run_job(job), run_job_on_ranks(job, 2, run_ranks)
    assert together.keys() == alone.keys()
    pairs = [(alone, together), *((alone["by_domain"][name], together["by_domain"][name]) for name in ("a", "b"))]
    for expected, found in pairs:
        for key in ("tokens", "bytes", "documents"):
            assert found[key] == expected[key]
        for key in ("loss", "perplexity", "bits_per_byte"):
            assert found[key] == pytest.approx(expected[key], rel=1e-6)
    for key in ("model", "step", "window", "stride", "start_token", "eos_scored", "precision"):
        assert together[key] == alone[key]


@pytest.mark.slow
def test_a_mistake_on_a_rank_is_told_by_the_parent(job: EvaluationJob, tmp_path: Path) -> None:
    # The second document is broken, which only the rank that reads that far finds out, while the model runs.
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(json.dumps({"text": TEXTS[1]}).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"broken.jsonl:2: invalid UTF-8"):
        run_job_on_ranks(replace(job, data={"broken": str(broken)}, total_bytes=None), 2, run_ranks)
