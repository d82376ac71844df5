"""What a job asks of Slurm when it is through, of a real one; and of one that is away for a while."""

import os
from pathlib import Path

import pytest

from launch.cluster import next_job
from launch.cluster.next_job import NextJob
from launch.cluster.profile import ClusterProfile
from launch.cluster.record import JobRecord
from launch.cluster.signals import Told
from launch.cluster.slurm import Slurm, SlurmError, SlurmRefusedError
from pretrain.run_dir import RunDir
from tests.slurm.cluster import Cluster, wait_for

SLEEP = "#!/bin/bash\n#SBATCH --output=/dev/null\n#SBATCH --time=5\n{}\nsleep 300\n"


def following(queue_id: str, array: str = "", tasks_left: int | None = None, told: Told | None = None) -> NextJob:
    record = JobRecord(
        cluster="virtual",
        profile=ClusterProfile(slurm_timeout_seconds=20),
        nodes=1,
        gpus_per_node=0,
        ranks_per_node=1,
        signal_lead_seconds=60,
    )
    return NextJob(RunDir(Path("/nowhere")), record, told or Told(), queue_id, array or queue_id, tasks_left)


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
    following("12", told=Told(term=True)).requeue()
    assert len(calls.read_text().splitlines()) == 1
