"""What srun says of a step that fails, in Slurm 22.05's own words; and steps of a real one."""

import sys
import time
from pathlib import Path

import pytest

from launch.cluster.profile import ClusterProfile
from launch.cluster.record import JobRecord
from launch.cluster.steps import Step, blame, srun_words
from pretrain.run_dir import RunDir
from tests.slurm.cluster import Cluster

EXITED = """srun: error: n1: task 0: Exited with exit code 3
srun: launch/slurm: _step_signal: Terminating StepId=2.0
srun: error: n2: task 1: Terminated
srun: Force Terminated StepId=2.0"""
KILLED = """step 1/40  loss 6.4
srun: error: n2: tasks 2-3: Killed
srun: launch/slurm: _step_signal: Terminating StepId=2.1
slurmstepd-n1: error: *** STEP 2.1 ON n1 CANCELLED AT 2026-11-22T12:57:11 ***
srun: error: n1: task 0: Terminated"""
NOT_STARTED = "srun: error: Unable to create step for job 17: More processors requested than permitted"


@pytest.mark.parametrize(
    ("said", "code", "message", "killed_by"),
    [
        (EXITED, 143, "task 0 on n1: exited with exit code 3", None),
        (KILLED, 143, "task 2 on n2 was killed by SIGKILL", "SIGKILL"),
        ("srun: error: n2: task 1: Exited with exit code 137", 137, "task 1 on n2 was killed by SIGKILL", "SIGKILL"),
        ("srun: error: n2: task 1: Segmentation fault (core dumped)", 139, "was killed by SIGSEGV", "SIGSEGV"),
        ("srun: error: n2: task 1: Out Of Memory", 1, "task 1 on n2: out Of Memory", None),
        (NOT_STARTED, 1, "Unable to create step for job 17: More processors", None),
        ("", 1, "exit code 1, and nothing more was said", None),
    ],
)
def test_the_first_task_to_fail_is_to_blame(said: str, code: int, message: str, killed_by: str | None) -> None:
    error = blame(said.splitlines(), code)
    assert message in str(error)
    assert error.killed_by == killed_by


def record(nodes: int = 2, ranks_per_node: int = 2, **profile: object) -> JobRecord:
    return JobRecord.model_validate(
        {
            "cluster": "virtual",
            "profile": ClusterProfile.model_validate(profile).model_dump(),
            "nodes": nodes,
            "gpus_per_node": 0,
            "ranks_per_node": ranks_per_node,
            "signal_lead_seconds": 60,
        }
    )


def test_tasks_are_numbered_node_by_node_and_not_confined(tmp_path: Path) -> None:
    words = srun_words(record(), RunDir(tmp_path), 2, ["-P", "-m", "launch.cluster.rank"])
    assert words[:2] == ["srun", "--nodes=2"]
    assert {"--ntasks=4", "--ntasks-per-node=2", "--distribution=block", "--cpu-bind=none"} <= set(words)
    assert words[-4:] == [sys.executable, "-P", "-m", "launch.cluster.rank"]
    assert "--overcommit" not in words


def test_with_torchrun_the_job_has_one_task_a_node(tmp_path: Path) -> None:
    torchrun = record(launcher="torchrun")
    assert "--overcommit" in srun_words(torchrun, RunDir(tmp_path), 2, [])
    assert "--overcommit" not in srun_words(torchrun, RunDir(tmp_path), 1, [])


TASK = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.environ["GREETING"], file=sys.stderr, flush=True)
time.sleep(float(os.environ["SECONDS"]))
"""


def test_a_step_ends_and_is_killed(slurm_here: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["srun", "--nodes=2", "--ntasks=2", sys.executable, "-c", TASK]
    step = Step(words, {"GREETING": "hello", "SECONDS": "1"})
    assert not step.wait(0.1)
    assert step.wait(20.0)
    assert step.error is None
    assert capfd.readouterr().err.count("hello") == 2

    step = Step(words, {"GREETING": "hello", "SECONDS": "60"})
    while not capfd.readouterr().err.count("hello"):
        time.sleep(0.1)
    started = time.monotonic()
    step.kill()
    assert time.monotonic() - started < 15.0
    assert step.wait(0.0)
    assert step.error is not None


def test_a_step_that_cannot_start_fails(slurm_here: Cluster) -> None:
    step = Step(["srun", "--nodes=1", "--partition=nowhere", "true"], {})
    assert step.wait(20.0)
    assert "partition" in str(step.error)
    step.kill()  # nothing to do
