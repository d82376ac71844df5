"""What a job asks of Slurm when it is through, of a real one; and of one that is away for a while."""

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch.cluster import next_job
from launch.cluster.next_job import NextJob
from launch.cluster.profile import ClusterProfile
from launch.cluster.record import JobRecord
from launch.cluster.signals import Told
from launch.cluster.slurm import Slurm, SlurmError, SlurmRefusedError
from launch.run_folder import recipe_path
from pretrain.recipe import dump_config, load_config
from pretrain.run_dir import RunDir
from tests.slurm.cluster import Cluster, wait_for

SLEEP = "#!/bin/bash\n#SBATCH --output=/dev/null\n#SBATCH --time=5\n{}\nsleep 300\n"


def as_submitted(slurm_timeout_seconds: float = 20.0) -> JobRecord:
    return JobRecord(
        cluster="virtual",
        profile=ClusterProfile(slurm_timeout_seconds=slurm_timeout_seconds),
        nodes=1,
        gpus_per_node=0,
        ranks_per_node=1,
        signal_lead_seconds=60,
    )


def following(queue_id: str, array: str = "", tasks_left: int | None = None, told: Told | None = None) -> NextJob:
    return NextJob(RunDir(Path("/nowhere")), as_submitted(), told or Told(), queue_id, array or queue_id, tasks_left)


def test_a_task_is_requeued_alone(slurm_here: Cluster) -> None:
    """The last task of an array bears the array's own number, by which all of them would be requeued."""
    slurm = Slurm()
    array = slurm.sbatch(SLEEP.format("#SBATCH --array=1-2\n#SBATCH --requeue"))
    wait_for("both tasks", lambda: [job.state for job in slurm.squeue(array)] == ["RUNNING"] * 2)
    following(f"{array}_2", array).requeue()
    wait_for("the second in the queue", lambda: slurm.squeue(f"{array}_2")[0].state == "PENDING")
    assert [job.state for job in slurm.squeue(f"{array}_1")] == ["RUNNING"]


def test_a_chain_ends(slurm_here: Cluster) -> None:
    slurm = Slurm()
    array = slurm.sbatch(SLEEP.format("#SBATCH --array=1-3%1"))
    wait_for("the first task", lambda: any(job.state == "RUNNING" for job in slurm.squeue(array)))
    following(f"{array}_1", array).end_chain()
    assert any(job.state == "PENDING" for job in slurm.squeue(array)), "a job that is no chain leaves others alone"
    following(f"{array}_1", array, tasks_left=2).end_chain()
    wait_for("no pending task", lambda: all(job.state != "PENDING" for job in slurm.squeue(array)))
    assert any(job.state == "RUNNING" for job in slurm.squeue(array))


def test_a_refusal_is_final(slurm_here: Cluster) -> None:
    slurm = Slurm()
    job = slurm.sbatch(SLEEP.format("#SBATCH --no-requeue"))
    wait_for("the job", lambda: slurm.squeue(job)[0].state == "RUNNING")
    with pytest.raises(SlurmRefusedError, match="scontrol requeue"):
        following(job).requeue()


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A controller that is away for two calls; the file that counts them."""
    count = tmp_path / "calls"
    tool = tmp_path / "scontrol"
    tool.write_text(
        f'#!/bin/sh\necho "$@" >> {count}\n[ $(wc -l < {count}) -gt 2 ] && exit 0\n'
        'echo "slurm_requeue error: Unable to contact slurm controller (connect failure)" >&2\nexit 1\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(next_job, "PAUSES_SECONDS", (0.05, 0.05))
    return count


def test_a_controller_that_is_away_is_asked_again(calls: Path) -> None:
    following("12").requeue()
    assert calls.read_text().splitlines() == ["requeue 12"] * 3


def test_but_not_for_ever(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_job, "INSIST_SECONDS", 0.0)
    with pytest.raises(SlurmError, match="Unable to contact"):
        following("12").requeue()
    assert len(calls.read_text().splitlines()) == 1


def test_nor_after_a_term(calls: Path) -> None:
    """Neither once more nor after a pause: somebody has ended this job, who may not want it again."""
    job = following("12", tasks_left=3, told=Told(term=True))
    job.requeue()
    job.end_chain()
    job.resubmit(["n2"], 60.0)
    assert not calls.exists()


def test_a_term_is_seen_in_a_pause(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_job, "PAUSES_SECONDS", (60.0, 60.0))
    told, began = Told(), time.monotonic()
    threading.Timer(0.5, lambda: setattr(told, "term", True)).start()
    following("12", told=told).requeue()
    assert time.monotonic() - began < 30
    assert len(calls.read_text().splitlines()) == 1


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose job was submitted as an array of 5."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    dump_config(load_config(recipe_path("58m"), ["data={sources: [{name: a, path: /a}]}"]), run.config_path)
    as_submitted().model_copy(update={"chain": 5, "job_ids": ("12",)}).write(run)
    run.script_path.write_text("as it was")
    return run


def answer(folder: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str) -> Path:
    """Slurm's commands, of which sbatch does this and the others nothing; returns the file that lists them."""
    asked = folder / "asked"
    for name, does in {"sbatch": sbatch, "scontrol": "exit 0", "scancel": "exit 0"}.items():
        tool = folder / name
        tool.write_text(f'#!/bin/sh\ncat >/dev/null\necho {name} "$@" >>{asked}\n{does}\n')
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return asked


def test_a_job_that_may_submit_none_goes_on_as_it_was_submitted(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run.job_path.read_text()
    asked = answer(tmp_path, monkeypatch, "echo sbatch: error: Access denied >&2; exit 1")
    replace(following("12_2", "12", tasks_left=3), run=run).resubmit(["n2"], 60.0)
    assert (run.job_path.read_text(), run.script_path.read_text()) == (before, "as it was")
    assert [line.split()[0] for line in asked.read_text().splitlines()] == ["sbatch"], "the rest of the chain goes on"
    replace(following("12"), run=run).resubmit(["n2"], 60.0)
    assert asked.read_text().splitlines()[-1] == "scontrol requeue 12"


def test_a_submission_without_an_answer_may_have_been_one(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the job neither requeues itself nor leaves its chain, which the other could meet."""
    asked = answer(tmp_path, monkeypatch, "exec sleep 60")
    job = replace(following("12_2", "12", tasks_left=3), run=run, record=as_submitted(slurm_timeout_seconds=1.0))
    as_submitted(slurm_timeout_seconds=1.0).model_copy(update={"chain": 5, "job_ids": ("12",)}).write(run)
    with pytest.raises(SlurmError, match="no answer in 1 s.*see if its job is queued"):
        job.resubmit(["n2"], 60.5)
    assert [line.split()[0] for line in asked.read_text().splitlines()] == ["sbatch", "scancel"]
    record = JobRecord.read(run)
    assert (record.chain, record.exclude, record.signal_lead_seconds) == (3, ("n2",), 61), "it would read that"
