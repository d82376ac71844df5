"""One run on the cluster that meets one fault after another, and is the run that met none."""

from pathlib import Path

import pytest

from pretrain.host_memory import NO_THREAD_CACHE
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import STEPS, Reference
from tests.slurm.faulty import Fault, hold, once
from tests.slurm.runs import ClusterRun, difference, skips

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_one_fault_after_another(cluster: Cluster, reference: Reference, settings: list[str], tmp_path: Path) -> None:
    """A bad node, a NaN, a rank that raises, one that is killed, one that is stopped, a preemption, a dead batch host,
    a controller that is away, and a person who stops the run and goes on with it."""
    not_a_number, raises = once("nan", 3, rank=1), once("raise", 8, rank=1)
    killed, stopped, preempted, crashed, halted = (hold(step) for step in (13, 14, 18, 23, 28))
    slow = Fault("slow", first=28, rank=0, seconds=0.5)  # a file is looked for every two seconds
    faults = (not_a_number, raises, killed, stopped, preempted, crashed, halted, slow)
    run = ClusterRun(cluster, tmp_path, faults, local_folder=f"{cluster.local}/$SLURM_JOB_ID")
    cluster.mount_on_node(1, "-t", "tmpfs", "-o", "size=16m", "tmpfs", cluster.local)  # its own disk is small
    run.submit("58m", "--nodes", 2, *settings)

    # The preflight finds the bad node, and the run is submitted again without it.
    assert list(run.wait_for_attempts(1, "preflight")["bad"]) == ["n1"]
    second = run.wait_for_attempts(2, "submitted")
    assert "n1" in second["why"]
    assert run.wait_for_attempts(1, "attempt_end")["action"] == "resubmit"

    # A gradient that is not a number is skipped; a rank that raises ends the attempt; both strike before step 9.
    ranks = run.wait_until_held(13, start=2)
    assert [event["step"] for event in run.events("step") if event["skipped"]] == [3]
    assert "n1" not in run.wait_for_attempts(2)["nodes"]
    failed = run.wait_for_attempts(2, "attempt_end")
    assert failed["action"] == "requeue"
    assert "inside backward" in failed["outcome"]["message"]
    assert [rank.environ()["GLIBC_TUNABLES"] for rank in ranks.values()] == [NO_THREAD_CACHE] * len(ranks)

    ranks[1].kill()
    run.python.remove(killed)
    ranks = run.wait_until_held(14, start=3)
    assert "SIGKILL" in run.attempts("attempt_end")[-1]["outcome"]["message"]

    ranks[1].suspend()
    run.python.remove(stopped)
    run.wait_until_held(18, start=4)
    assert "rank 1" in run.attempts("attempt_end")[-1]["outcome"]["message"]

    # Slurm takes the nodes away: the run saves where it is, and goes on when they are free again.
    other = cluster.ask(
        "sbatch",
        "--parsable",
        "--partition=high",
        "--nodes=4",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "sleep 600",
    )
    run.wait_for_attempts(1, "signal")
    run.python.remove(preempted)
    wait_for("the other job to run", lambda: cluster.jobs(int(other))[int(other)]["state"] == "RUNNING")
    cluster.ask("scancel", other)
    run.wait_until_held(23, start=5)
    assert run.events("start")[-1]["step"] == 18
    assert run.attempts("attempt_end")[-1]["action"] == "slurm"

    batch_host = int(run.attempts("attempt")[-1]["nodes"][0].removeprefix("n"))
    cluster.kill_node(batch_host)
    run.python.remove(crashed)
    run.wait_until_held(28, start=6)
    assert f"n{batch_host}" not in run.attempts("attempt")[-1]["nodes"]

    # What needs no answer of the controller's goes on without it.
    cluster.kill_controller()
    run.dir.stop_path.touch()
    run.python.remove(halted)
    run.wait_for("the run to stop", lambda: run.events("end") and run.events("end")[-1]["status"] == "stopped")
    cluster.start_controller()
    run.wait_for_end("FAILED")  # Slurm's word for any exit code but 0
    assert run.attempts("attempt_end")[-1]["action"] == "stop"
    assert run.attempts("attempt_end")[-1]["outcome"]["exit_code"] == 75

    run.steppe("resume", run.dir.path)
    run.wait_for_end("COMPLETED")
    assert run.steps_since_start()[-1] == STEPS
    assert not difference(run.dir.path, reference(*skips(run.dir.path)))
