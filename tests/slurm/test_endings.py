"""How runs on the cluster end that do not go on by themselves: without progress, by a person, or by what is wrong."""

import signal
from pathlib import Path

import pytest

from pretrain.checkpoint.folder import newest_checkpoint
from pretrain.host_memory import NO_THREAD_CACHE
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import STEPS, Reference
from tests.slurm.faulty import Fault, hold
from tests.slurm.runs import ClusterRun, curve, difference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_no_progress_ends_a_run(cluster: Cluster, settings: list[str], tmp_path: Path) -> None:
    """A crash that comes every time, before there is a checkpoint: the run is given up after two attempts."""
    always = Fault("raise", first=3, last=3, rank=1)
    run = ClusterRun(cluster, tmp_path, [always], max_restarts_without_progress=2, preflight={"seconds": 0})
    run.submit("58m", "--nodes", 2, *settings)
    run.wait_for_end("FAILED")
    ends = run.attempts("attempt_end")
    assert [end["action"] for end in ends] == ["requeue", "stop"]
    assert "no progress" in ends[-1]["why"]
    assert all("inside backward" in end["outcome"]["message"] for end in ends), ends
    assert run.status()["state"] == "failed"


def test_a_changed_config_is_refused_and_a_cancelled_job_stays_so(
    cluster: Cluster, reference: Reference, settings: list[str], tmp_path: Path
) -> None:
    """On ranks that torch's launcher has started."""
    killed, cancelled = hold(8), hold(13)
    own = "glibc.malloc.arena_max=8"
    environment = {"OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": own}
    profile = {"launcher": "torchrun", "environment": environment, "preflight": {"seconds": 0}}
    run = ClusterRun(cluster, tmp_path, [killed, cancelled], **profile)
    run.submit("58m", "--nodes", 2, *settings)

    # An edit of the frozen config is found by the next attempt, which nobody wanted to be another run.
    ranks = run.wait_until_held(8, start=1)
    for rank in ranks.values():  # glibc 2.36 ends each setting in place, by a zero, once it has read it
        started_with = ":" + Path(f"/proc/{rank.pid}/environ").read_text().replace("\0", ":")
        assert f":GLIBC_TUNABLES={NO_THREAD_CACHE}:{own}:" in started_with
    run.wait_for("the save of step 5", (run.dir.checkpoints / "step_00000005").is_dir)
    config = run.dir.config_path.read_text()
    run.dir.config_path.write_text(config.replace("lr: 0.01", "lr: 0.02"))
    assert run.dir.config_path.read_text() != config
    ranks[1].kill()
    run.python.remove(killed)
    run.wait_for_end("FAILED")
    assert [end["action"] for end in run.attempts("attempt_end")] == ["requeue", "stop"]
    assert run.attempts("attempt_end")[-1]["outcome"]["exit_code"] == 2
    assert "config.yaml was changed by hand" in run.attempts("attempt_end")[-1]["outcome"]["message"]
    assert len(run.events("start")) == 1

    run.dir.config_path.write_text(config)
    run.steppe("resume", run.dir.path, "--nodes", 2)
    run.wait_until_held(13, start=2)
    assert run.events("start")[-1]["step"] == 5
    cluster.ask("scancel", run.job_id)
    run.wait_for_attempts(1, "signal")
    run.python.remove(cancelled)
    run.wait_for_end("CANCELLED")
    end = run.wait_for_attempts(3, "attempt_end")
    assert (end["action"], end["outcome"]["exit_code"]) == ("slurm", 75)
    newest = newest_checkpoint(run.dir.checkpoints)
    assert newest is not None
    assert newest.name == "step_00000013"
    assert run.status()["state"] == "cancelled"
    assert curve(run.dir.path) == {step: row for step, row in curve(reference()).items() if step <= 13}


@pytest.mark.long
def test_a_chain_goes_on_where_nothing_may_be_requeued(
    cluster: Cluster, reference: Reference, settings: list[str], tmp_path: Path
) -> None:
    """The first of four jobs is told that its time is over, the second's rank is killed, the third finishes; the fourth
    is not run."""
    told, killed = hold(8), hold(13)
    run = ClusterRun(cluster, tmp_path, [told, killed], requeue=False)
    run.submit("58m", "--nodes", 2, "--chain", 4, *settings)
    run.wait_until_held(8, start=1)
    run.tell(signal.SIGUSR1)
    run.wait_for_attempts(1, "signal")
    run.python.remove(told)
    run.wait_until_held(13, start=2)[1].kill()
    run.python.remove(killed)
    run.wait_for_attempts(3, "attempt_end")
    run.wait_for("the queue to be empty", lambda: not cluster.ask("squeue", "--noheader"))
    assert [end["action"] for end in run.attempts("attempt_end")] == ["next", "next", "done"]
    assert [attempt["array_task"] for attempt in run.attempts("attempt")] == [1, 2, 3]
    assert run.steps_since_start()[-1] == STEPS
    assert not difference(run.dir.path, reference())


@pytest.mark.long
def test_a_sweep_is_one_array(cluster: Cluster, settings: list[str], tmp_path: Path) -> None:
    """Four points, each on a node of its own, and a table that compares them."""
    run = ClusterRun(cluster, tmp_path)
    axes = ("--sweep", "optimizer.lr=1e-2,3e-3", "--sweep", "seed=0,1")
    run.submit("58m", "--nodes", 1, *axes, *settings)
    run.wait_for("the queue to be empty", lambda: not cluster.ask("squeue", "--noheader"))
    points = sorted(path for path in run.dir.path.iterdir() if path.is_dir() and path.name != "logs")
    assert len(points) == 4
    curves = [curve(point) for point in points]
    assert [max(steps) for steps in curves] == [STEPS] * 4
    assert len({steps[STEPS] for steps in curves}) == 4
    table = run.steppe("status", run.dir.path).stdout
    for point in points:
        assert f"{curve(point)[STEPS][0]:.4f}"[:5] in table
