"""The supervisor, as far as it goes without ranks: those run in tests/slurm."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster.job import PORTS, free_port, is_done, tasks_left
from launch.cluster.profile import ClusterProfile
from launch.cluster.record import JobRecord, append_attempt, read_attempts
from launch.run_folder import locked
from pretrain.outcome import Outcome
from pretrain.recipe import dump_config
from pretrain.run_dir import RunDir
from tests.slurm.cluster import Cluster
from tests.small_run import small_config

IN_A_JOB = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NODELIST": "n1",
    "SLURMD_NODENAME": "n1",
}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that was submitted."""
    run = RunDir(tmp_path)
    run.logs.mkdir()
    dump_config(small_config(), run.config_path)
    JobRecord(
        cluster="virtual",
        profile=ClusterProfile(),
        nodes=1,
        gpus_per_node=0,
        ranks_per_node=1,
        signal_lead_seconds=60,
    ).write(run)
    append_attempt(run, "submitted", job_id="12", nodes=1, ranks=1, cluster="virtual", why="submit")
    return run


def supervise(run: RunDir, **variables: str) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-P", "-m", "launch.cluster.job", str(run.path)]
    environment = {**os.environ, **IN_A_JOB, **variables}
    return subprocess.run(words, capture_output=True, text=True, timeout=180, check=False, env=environment)


def test_a_config_that_was_changed_is_refused_for_good(slurm_here: Cluster, run: RunDir) -> None:
    run.config_path.write_text(run.config_path.read_text().replace("seed: 0", "seed: 1"))
    done = supervise(run)
    assert done.returncode == 2, done.stderr
    assert "config.yaml was changed by hand" in done.stderr
    (end,) = read_attempts(run, "attempt_end")
    assert (end["action"], end["outcome"]["exit_code"]) == ("stop", 2)
    assert Outcome.read(run).exit_code == 2
    assert [line["type"] for line in read_attempts(run)] == ["submitted", "attempt", "attempt_end"]


def test_ranks_are_not_started_only_to_be_stopped(slurm_here: Cluster, run: RunDir) -> None:
    run.stop_path.touch()
    done = supervise(run)
    assert done.returncode == 75, done.stderr
    (end,) = read_attempts(run, "attempt_end")
    assert (end["action"], end["why"], end["outcome"]["status"]) == ("stop", "a person asked for it", "stopped")
    assert [line["type"] for line in read_attempts(run)] == ["submitted", "attempt", "attempt_end"]
    assert run.stop_path.exists(), "whoever starts it by hand finds it stopped again"


def test_a_run_that_is_complete_is_left_alone(run: RunDir) -> None:
    append_attempt(run, "attempt_end", job_id="12", action="done")
    done = supervise(run)
    assert (done.returncode, done.stderr) == (0, "the run is complete\n")


@pytest.mark.usefixtures("slurm_here")
def test_one_attempt_at_a_time(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.cluster import job
    from launch.cluster.signals import Told
    from launch.run_folder import LockedError

    monkeypatch.setattr(job, "LOCK_PATIENCE_SECONDS", 0.0)
    with locked(run), pytest.raises(LockedError, match="is being trained in by another process"):
        job.supervise(run, Told())
    assert not read_attempts(run, "attempt")


def test_a_folder_that_was_not_submitted(tmp_path: Path) -> None:
    done = supervise(RunDir(tmp_path))
    assert done.returncode == 2
    assert "was not submitted to a cluster" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_error_of_ours_is_not_taken_for_wrong_input(run: RunDir, tmp_path: Path) -> None:
    """A retry may help: exit code 1. Such as without Slurm's commands, or with variables that make no sense."""
    done = supervise(run, PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "steppe: scontrol is not on this machine: run this where Slurm is, on a login node\n"
    done = supervise(run, SLURM_RESTART_COUNT="many")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    run.job_path.write_text("{")
    done = supervise(run)
    assert done.returncode == 2
    assert "is damaged" in done.stderr


@pytest.mark.parametrize(
    ("variables", "left"),
    [
        ({}, None),
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MAX": "5"}, 3),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MAX": "5"}, 0),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MAX": "3"}, 0),
    ],
)
def test_what_is_left_of_a_chain_is_what_slurm_says(variables: dict[str, str], left: int | None) -> None:
    assert tasks_left(variables) == left


def test_a_run_is_complete_for_the_job_that_completed_it(run: RunDir) -> None:
    append_attempt(run, "attempt_end", job_id="12", action="requeue")
    assert not is_done(run, "12")
    append_attempt(run, "attempt_end", job_id="12", action="done")
    assert is_done(run, "12")
    assert not is_done(run, "13"), "it was submitted again, for longer"


def test_a_port_that_is_free() -> None:
    port = free_port()
    assert port in PORTS
    with socket.socket() as server:
        server.bind(("", port))
        assert all(free_port() != port for _ in range(20))
