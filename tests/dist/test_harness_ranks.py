"""Benchmarks on two real ranks: what one rank says, to the last digit."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.ranks import run_ranks
from pretrain.evaluation.harness_job import TasksJob, run_tasks_job
from tests.benchmark_tasks import KINDS, trained_llama, write_tasks


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TasksJob:
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "hf").mkdir()
    model, tasks = trained_llama(folder / "hf"), write_tasks(folder / "tasks")
    return TasksJob(str(model), (*KINDS, "tiny_draws"), str(tasks), batch_tokens=256)


@pytest.mark.slow
def test_two_ranks_equal_one(job: TasksJob, tmp_path: Path) -> None:
    alone = run_tasks_job(replace(job, samples=str(tmp_path / "alone")))
    together = run_tasks_job(replace(job, samples=str(tmp_path / "together")), 2, run_ranks)
    assert (alone["cost"]["ranks"], together["cost"]["ranks"]) == (1, 2)
    assert {**together, "cost": None} == {**alone, "cost": None}
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "together" / path.name).read_text() == path.read_text()


@pytest.mark.slow
def test_fewer_documents_than_ranks(job: TasksJob) -> None:
    single = replace(job, tasks=("tiny_text",), limit=1)
    assert run_tasks_job(single, 2, run_ranks)["tasks"] == run_tasks_job(single)["tasks"]
