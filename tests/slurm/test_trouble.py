"""Trouble with the cluster itself, under runs that then are the run that met none."""

import os
import sysconfig
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import STEPS, Reference
from tests.slurm.faulty import Fault, hold
from tests.slurm.runs import ClusterRun, difference

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]
LEFT_BYTES = 20_000  # of a full disk: less than a rank's file


def test_time_limit(cluster: Cluster, reference: Reference, settings: list[str], tmp_path: Path) -> None:
    """A job of two minutes, and a run that takes longer: it is told in time, saves, and requeues itself."""
    slow = Fault("slow", last=35, rank=0, seconds=4.0)
    run = ClusterRun(cluster, tmp_path, [slow], time_limit="2", signal_lead_seconds=45)
    run.submit("58m", "--nodes", 2, *settings)
    end = run.wait_for_attempts(1, "attempt_end")
    assert (end["action"], end["outcome"]["status"]) == ("requeue", "stopped"), end
    assert {signal["name"] for signal in run.attempts("signal")} <= {"USR1", "time"}
    run.python.remove(slow)
    run.wait_for_end("COMPLETED")
    assert run.events("start")[-1]["step"] == end["outcome"]["step"]  # nothing was made twice
    assert not difference(run.dir.path, reference())


def test_requeued_in_the_middle_of_a_save(
    cluster: Cluster, reference: Reference, settings: list[str], tmp_path: Path
) -> None:
    saves, held = Fault("hold save", first=10, last=10, rank=1), hold(13)
    run = ClusterRun(cluster, tmp_path, [saves, held])
    run.submit("58m", "--nodes", 2, *settings)
    run.wait_until_held(13, start=1)
    assert (run.dir.checkpoints / "step_00000010.tmp").is_dir()
    cluster.ask("scontrol", "requeue", run.job_id)
    run.wait_for_attempts(2)
    run.python.remove(saves, held)
    run.wait_for_end("COMPLETED")
    assert run.events("start")[-1]["step"] == 5
    assert not difference(run.dir.path, reference())


def test_full_disk(cluster: Cluster, reference: Reference, settings: list[str], tmp_path: Path) -> None:
    """Full for a while, the disk costs a checkpoint; full at the end, an attempt."""
    fills, empties, fills_again = hold(8), hold(13), hold(38)
    run = ClusterRun(cluster, tmp_path, [fills, empties, fills_again])
    run.submit("58m", "--nodes", 2, *settings)
    run.dir.checkpoints.symlink_to(cluster.small_disk)  # before there is a rank
    ballast = cluster.small_disk / "ballast"
    run.wait_until_held(8, start=1)
    fill(ballast)
    run.python.remove(fills)
    run.wait_until_held(13, start=1)
    assert [event["step"] for event in run.events("checkpoint_failed")] == [10]
    ballast.unlink()
    run.python.remove(empties)
    run.wait_until_held(38, start=1)
    assert run.events("checkpoint")[-1]["step"] == 35
    fill(ballast)
    run.python.remove(fills_again)
    end = run.wait_for_attempts(1, "attempt_end")
    assert end["action"] == "requeue"
    assert "No space left on device" in end["outcome"]["message"]
    ballast.unlink()
    run.wait_for_end("COMPLETED")
    assert run.steps_since_start()[-1] == STEPS
    assert not difference(run.dir.path, reference())


def fill(ballast: Path) -> None:
    """Leave next to nothing of a disk."""
    disk = os.statvfs(ballast.parent)
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - LEFT_BYTES)


def test_a_node_with_another_torch(cluster: Cluster, reference: Reference, settings: list[str], tmp_path: Path) -> None:
    """It is found out by the preflight, named, and left out."""
    (metadata,) = Path(sysconfig.get_paths()["purelib"]).glob("torch-*.dist-info/METADATA")
    other = tmp_path / "METADATA"
    other.write_text(metadata.read_text().replace("\nVersion: 2.", "\nVersion: 1.", 1))
    cluster.mount_on_node(2, "--bind", other, metadata)
    run = ClusterRun(cluster, tmp_path)
    run.submit("58m", "--nodes", 3, *settings, "--set", "batch={global_batch_size: 9, micro_batch_size: 3}")
    (reason,) = run.wait_for_attempts(1, "preflight")["bad"].items()
    assert reason[0] == "n2"
    assert "torch" in reason[1]
    run.wait_for_end("COMPLETED")
    assert run.attempts("attempt")[-1]["nodes"] == ["n1", "n3", "n4"]


def test_the_controller_is_away_when_it_is_needed(
    cluster: Cluster, reference: Reference, settings: list[str], tmp_path: Path
) -> None:
    """A rank dies while nobody can take the requeue: the job asks until somebody does."""
    held = hold(8)
    run = ClusterRun(cluster, tmp_path, [held], slurm_timeout_seconds=5)
    run.submit("58m", "--nodes", 2, *settings)
    ranks = run.wait_until_held(8, start=1)
    cluster.kill_controller()
    ranks[1].kill()
    run.python.remove(held)
    run.wait_for("the attempt to fail", lambda: run.dir.outcome_path.is_file())
    cluster.start_controller()
    run.wait_for_end("COMPLETED")
    assert run.attempts("attempt_end")[0]["action"] == "requeue"
    assert not difference(run.dir.path, reference())
