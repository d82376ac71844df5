"""Calls of Slurm's commands, against a real Slurm; and against none, and one that does not answer."""

import os
import time
from pathlib import Path

import pytest

from launch.cluster.slurm import (
    Job,
    NoSlurmError,
    Slurm,
    SlurmError,
    SlurmRefusedError,
    clean_environment,
    parse_job,
)
from tests.slurm.cluster import Cluster, wait_for

SLEEP = "#!/bin/bash\n#SBATCH --output=/dev/null\n#SBATCH --time=5\n{}\nsleep 300\n"


@pytest.mark.slow
def test_a_job_from_queue_to_end(slurm_here: Cluster) -> None:
    slurm = Slurm()
    job_id = slurm.sbatch(SLEEP.format("#SBATCH --nodes=2"))
    (job,) = wait_for("the job", lambda: [job for job in slurm.squeue(job_id) if job.state == "RUNNING"])
    assert (job.job_id, job.array_job_id, job.array_task, job.nodes, job.is_over) == (job_id, job_id, None, 2, False)
    assert len(slurm.hostnames(job.node_list)) == 2
    assert job.start_time is not None
    assert abs(job.start_time - time.time()) < 60
    assert job.end_time == job.start_time + 300
    slurm.requeue(job_id)
    wait_for("the requeue", lambda: slurm.squeue(job_id)[0].state in ("PENDING", "RUNNING"))
    slurm.cancel(job_id)
    (job,) = wait_for("its end", lambda: [job for job in slurm.squeue(job_id) if job.is_over])
    assert job.state == "CANCELLED"
    slurm.cancel(job_id)  # no error


@pytest.mark.slow
def test_tasks_of_an_array(slurm_here: Cluster) -> None:
    slurm = Slurm()
    job_id = slurm.sbatch(SLEEP.format("#SBATCH --array=1-3%1"))
    wait_for("the first task", lambda: [job for job in slurm.squeue(job_id) if job.state == "RUNNING"])
    states = {job.job_id: job.state for job in slurm.squeue(job_id)}
    assert states == {f"{job_id}_1": "RUNNING", f"{job_id}_[2-3%1]": "PENDING"}
    assert [job.job_id for job in slurm.squeue(f"{job_id}_1")] == [f"{job_id}_1"]
    assert {job.array_job_id for job in slurm.squeue(job_id)} == {job_id}
    slurm.cancel(job_id, pending_only=True)
    wait_for("no pending task", lambda: all(job.state != "PENDING" for job in slurm.squeue(job_id)))
    assert [job.job_id for job in slurm.squeue(job_id) if job.state == "RUNNING"] == [f"{job_id}_1"]


@pytest.mark.slow
def test_what_slurm_does_not_know_or_want(slurm_here: Cluster) -> None:
    slurm = Slurm()
    assert slurm.squeue("424242") == []
    assert slurm.hostnames("") == []
    with pytest.raises(SlurmRefusedError, match="sbatch --test-only: .*invalid partition specified: nowhere"):
        slurm.test_only(SLEEP.format("#SBATCH --partition=nowhere"))
    with pytest.raises(SlurmRefusedError, match="Invalid job id"):
        slurm.requeue("424242")
    assert "to start at" in slurm.test_only(SLEEP.format("#SBATCH --nodes=4"))
    assert slurm.squeue(slurm.sbatch(SLEEP.format("#SBATCH --hold")))[0].state == "PENDING"


@pytest.mark.slow
def test_the_script_is_what_holds(slurm_here: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither sbatch's variables nor those of a job that submits another come into it."""
    for name, value in {"SBATCH_PARTITION": "high", "SLURM_RESTART_COUNT": "5", "RANK": "3", "MINE": "kept"}.items():
        monkeypatch.setenv(name, value)
    seen = tmp_path / "seen"
    words = "$SLURM_JOB_PARTITION/$SLURM_RESTART_COUNT/$RANK/$MINE"
    script = f'#!/bin/bash\n#SBATCH --partition=main --output=/dev/null\necho "{words}" >{seen}'
    Slurm().sbatch(script)
    assert wait_for("the job", lambda: seen.is_file() and seen.read_text()) == "main///kept\n"


@pytest.mark.slow
def test_a_dead_controller_is_no_refusal(slurm_here: Cluster) -> None:
    slurm_here.kill_controller()
    try:
        with pytest.raises(SlurmError) as error:
            Slurm(timeout_seconds=1.0).squeue("1")
        assert not isinstance(error.value, SlurmRefusedError)
    finally:
        slurm_here.start_controller()


def test_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoSlurmError, match="sbatch is not on this machine"):
        Slurm().sbatch("")


def test_every_call_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\nexec sleep 60\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    begun = time.monotonic()
    with pytest.raises(SlurmError, match="squeue .*: no answer in 0.3 s; is Slurm's controller up"):
        Slurm(timeout_seconds=0.3).squeue("1")
    assert time.monotonic() - begun < 10


def test_a_line_of_squeue() -> None:
    expected = Job("4_[2-3%1]", "4", "2-3%1", "PENDING", 2, None, None, "", "a|reason")
    assert parse_job("4_[2-3%1]|4|2-3%1|PENDING|2|N/A|N/A||a|reason") == expected


def test_what_is_left_of_the_environment() -> None:
    dropped = {"SLURM_JOB_ID": "1", "SBATCH_QOS": "x", "PYTHONPATH": "/old", "CUDA_VISIBLE_DEVICES": "0"}
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "token", "PATH": "/bin", "BASH_FUNC_module%%": "() { :; }"}
    assert clean_environment(dropped | kept) == kept
