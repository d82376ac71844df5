"""A job of benchmarks from request to result: which tasks it means, what it returns, and what it refuses at once."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.evaluation.harness_job import TasksJob, check_tasks, run_tasks_job
from pretrain.evaluation.harness_tasks import find_tasks, load_tasks
from tests.benchmark_tasks import write_tasks
from tests.tiny_hf import tiny_hf_folder


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TasksJob:
    folder = tmp_path_factory.mktemp("job")
    return TasksJob(str(tiny_hf_folder(folder / "hf")), ("tiny_text",), str(write_tasks(folder / "tasks", documents=3)))


def test_a_job(job: TasksJob, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = replace(job, tasks=("tiny_group", "tiny_te*"), limit=2, num_fewshot=1, samples=str(tmp_path / "samples"))
    result = run_tasks_job(asked)
    assert capfd.readouterr().out == ""
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    tasks = result["tasks"]
    assert tasks["results"].keys() == {"tiny_group", "tiny_choice", "tiny_word", "tiny_text"}
    assert tasks["n-shot"]["tiny_choice"] == tasks["n-samples"]["tiny_choice"]["effective"] - 1 == 1
    assert tasks["versions"]["tiny_text"] == 1.0
    assert "tiny_group" in tasks["groups"]
    assert (result["model"], result["step"], result["precision"]) == (job.model, None, "fp32")
    assert result["cost"]["ranks"] == 1
    assert result["cost"]["seconds"] > 0
    assert any("Only the first 2 documents" in line for line in result["conventions"])
    assert any(
        "at most 64 tokens at once; 5 contexts" in line or "contexts were longer" in line
        for line in result["conventions"]
    )
    samples = [json.loads(line) for line in (tmp_path / "samples" / "tiny_text.jsonl").read_text().splitlines()]
    assert [sample["doc_id"] for sample in samples] == [0, 1]
    with pytest.raises(ValueError, match="samples exists: name a new folder"):
        check_tasks(asked)


def test_samples_are_kept_whatever_a_task_is_called(job: TasksJob, tmp_path: Path) -> None:
    assert job.task_folder is not None
    task = yaml.safe_load((Path(job.task_folder) / "tiny_text.yaml").read_text())
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "t.yaml").write_text(yaml.safe_dump({**task, "task": "mine/tiny"}))
    samples = tmp_path / "samples"
    run_tasks_job(replace(job, tasks=("mine/tiny",), task_folder=str(tmp_path / "tasks"), samples=str(samples)))
    lines = (samples / "mine_tiny.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc_id"] for line in lines] == [0, 1, 2]


def test_the_tasks_of_a_folder_need_none_of_lm_evals(job: TasksJob) -> None:
    assert job.task_folder is not None
    manager, names = find_tasks(("tiny_*", "tiny_text"), Path(job.task_folder))
    assert names == ["tiny_choice", "tiny_draws", "tiny_group", "tiny_tag", "tiny_text", "tiny_word", "tiny_writing"]
    manager, names = find_tasks(("tiny_tag",), Path(job.task_folder))
    assert len(manager.all_tasks) == 7
    assert load_tasks(manager, names, None)["tasks"].keys() == {"tiny_text", "tiny_writing"}


@pytest.mark.slow  # lm-eval's own tasks are many thousands
def test_an_unknown_task(job: TasksJob) -> None:
    with pytest.raises(ValueError, match="--tasks hellaswagg: no task.* of .*tasks and lm-eval is.*mean hellaswag"):
        check_tasks(replace(job, tasks=("tiny_text", "hellaswag", "hellaswagg")))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": ()}, "there is no task to run: name some"),
        ({"task_folder": "nowhere"}, "--task-folder nowhere is not a folder"),
        ({"num_fewshot": -1}, "num_fewshot=-1 must be at least 0"),
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"precision": "fp16"}, "precision=fp16: an evaluation runs in fp32 or bf16"),
    ],
)
def test_what_is_refused_at_once(job: TasksJob, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tasks(replace(job, **wrong))


def test_without_lm_eval(job: TasksJob, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    with pytest.raises(
        ValueError, match=r"--tasks needs lm-eval, which is not installed: pip install 'steppe\[harness\]'"
    ):
        run_tasks_job(job)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doc_to_text": "{{ before"}, "TemplateSyntaxError"),
        ({"test_split": "nowhere"}, "KeyError: 'nowhere'"),
        ({"dataset_kwargs": {"data_files": {"test": "/nowhere/at/all.jsonl"}}}, "/nowhere/at/all.jsonl"),
    ],
)
def test_a_broken_task_is_a_mistake(
    job: TasksJob, change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job.task_folder is not None
    task = yaml.safe_load((Path(job.task_folder) / "tiny_text.yaml").read_text())
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump({**task, **change}))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        run_tasks_job(replace(job, task_folder=str(tmp_path)))
    assert "\n" not in str(caught.value)
