"""How much memory a preparation takes for what it is."""

from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from data_pipeline.corpus.config import corpus_of
from data_pipeline.curation.duplicates import DEFAULT_MEMORY_BYTES
from data_pipeline.preparation import plan as plans
from data_pipeline.preparation import workers
from data_pipeline.preparation.curation_phases import DuplicatesPhase
from data_pipeline.preparation.job import Request, open_job, phases_of, prepare_corpus
from data_pipeline.preparation.memory import available_bytes
from data_pipeline.preparation.plan import make_plan
from data_pipeline.preparation.workers import work_through
from tests.unit.data_pipeline.preparation.folders import files_of, sample_texts, write_corpus

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """What Linux says of a machine of 100 GiB, and of a job that a Slurm gave 8 GiB of it."""
    job = tmp_path / "cgroup" / "slurm" / "job_7"
    (job / "step_0").mkdir(parents=True)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(f"MemFree: 1 kB\nMemAvailable:   {100 * GIB // 1024} kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/slurm/job_7/step_0\n")
    (job / "memory.max").write_text(f"{8 * GIB}\n")
    (job / "memory.current").write_text(f"{5 * GIB}\n")
    (job / "memory.stat").write_text(f"anon 7\ninactive_anon 9\ninactive_file {GIB}\nactive_file {GIB}\n")
    (job / "step_0" / "memory.max").write_text("max\n")
    return tmp_path


def test_a_group_s_limit_holds_for_those_below_it(machine: Path) -> None:
    assert available_bytes(machine / "proc", machine / "cgroup") == 5 * GIB
    (machine / "cgroup" / "slurm" / "job_7" / "memory.current").write_text(f"{11 * GIB}\n")
    assert available_bytes(machine / "proc", machine / "cgroup") == 0
    (machine / "proc" / "self" / "cgroup").write_text("0::/\n")
    assert available_bytes(machine / "proc", machine / "cgroup") == 100 * GIB
    assert available_bytes(machine / "proc", machine / "none") == 100 * GIB


def test_this_machine_s() -> None:
    assert 0 < available_bytes() <= psutil.virtual_memory().total


def test_memory_is_chosen_with_the_plan_and_changes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "available_bytes", lambda: 100 * GIB)
    plan = make_plan(corpus_of([__file__]), "abc", 1000)
    assert plan.duplicates_memory_bytes == DEFAULT_MEMORY_BYTES
    monkeypatch.setattr(plans, "available_bytes", lambda: GIB)
    small = make_plan(corpus_of([__file__]), "abc", 1000)
    assert small.duplicates_memory_bytes == GIB // 2
    monkeypatch.setattr(plans, "available_bytes", lambda: 0)
    assert make_plan(corpus_of([__file__]), "abc", 1000).duplicates_memory_bytes == 64 << 20
    assert small.fingerprint == plan.fingerprint
    assert small.difference(plan) is None


def test_memory_bounds_the_workers_of_the_search(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with room for three looks for duplicates with three, whatever its cores; what it finds is the same."""
    texts = sample_texts(40)
    corpus = corpus_of([write_corpus(tmp_path / "c", [*texts, *texts[:10]], 2)])
    curation = corpus.curation.model_copy(update={"exact_duplicates": True})
    request = Request(corpus.model_copy(update={"curation": curation}), str(tokenizer_path), tmp_path / "d")
    needed = 96 * 10 + workers.WORKER_BYTES
    monkeypatch.setattr(workers, "PROCESS_BYTES", 1)
    monkeypatch.setattr(workers, "available_bytes", lambda: 3 * needed)
    crews: list[tuple[str, int]] = []

    class Crew:
        def __init__(self, phase: DuplicatesPhase, processes: int, threads: int, meter: workers._Meter) -> None:
            crews.append((phase.name, processes))
            self.run = lambda: workers.do_tasks(phase, threads, meter.reach)

    monkeypatch.setattr(workers, "_Crew", Crew)
    with open_job(request) as job:
        assert job is not None
        job.plan = replace(job.plan, duplicates_memory_bytes=96 * 10)
        for phase in phases_of(job):
            work_through(phase, 8, lambda progress: None)
    assert ("duplicates", 3) in crews
    undisturbed = replace(request, out=tmp_path / "undisturbed")
    prepare_corpus(undisturbed, 1)
    prepare_corpus(request, 1)
    assert files_of(request.out) == files_of(undisturbed.out)
