"""Looking at a run: local and as a job, with Slurm, without its answer; a sweep; and how it is shown."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from launch.cluster.cancel import cancel_run, cancel_sweep
from launch.cluster.profile import ClusterProfile
from launch.cluster.record import JobRecord
from launch.cluster.slurm import Job, Slurm, SlurmError
from launch.cluster.slurm_view import SlurmView, is_of
from launch.cluster.status import WatchedRun
from launch.cluster.sweep import Point, Sweep
from launch.cluster.sweep_status import WatchedSweep
from launch.status_view import duration, run_view, sweep_view
from pretrain.outcome import Outcome
from pretrain.recipe import dump_config
from pretrain.run_dir import RunDir
from tests.slurm.cluster import Cluster, wait_for
from tests.small_run import small_config
from tests.unit.launch.history_of_a_run import MadeUpRun

SLEEP = "#!/bin/bash\n#SBATCH --output=/dev/null\n#SBATCH --time=5\n{}\nsleep 300\n"
MakeRun = Callable[..., RunDir]


def folder(path: Path, *overrides: str) -> RunDir:
    path.mkdir(parents=True)
    run = RunDir(path)
    dump_config(small_config(*overrides), run.config_path)
    return run


def with_job(run: RunDir, job_id: str) -> None:
    JobRecord(
        cluster="here",
        profile=ClusterProfile(time_limit="10"),
        nodes=1,
        ranks_per_node=2,
        time_limit="10",
        signal_lead_seconds=60,
        job_ids=(job_id,),
    ).write(run)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[RunDir, MadeUpRun]:
    """A run on this machine, 5 of 8 steps far, whose ranks have gone without a word."""
    run = folder(tmp_path / "run")
    made = MadeUpRun(cluster=False, now=time.time() - 100)
    made.attempt(0, 4.0)
    made.events[0]["host"] = socket.gethostname()
    for _ in range(5):
        made.makes_step(2.0)
    made.starts_save(0.5)
    made.validates(1.0)
    made.reports()
    made.write_to(run)
    return run, made


def text_of(view: object) -> str:
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(view)
    return console.export_text()


def test_a_run_that_is_lost(trained: tuple[RunDir, MadeUpRun]) -> None:
    found = WatchedRun(trained[0].path).look()
    assert (found.state, found.step, found.total_steps, found.job_id) == ("lost", 5, 8, None)
    assert found.checkpoint is not None
    assert found.checkpoint["step"] == 5
    assert found.validation == {"step": 5, "by_source": {"a": {"loss": 2 + 9 / 5, "bits_per_byte": 1.25}}}
    assert [row["ended"] for row in found.attempts] == ["killed"]
    json.dumps(found.as_json())
    shown = text_of(run_view(found))
    assert "lost: its processes are gone, and have not said why" in shown
    assert "5 of 8 (62.5%)" in shown
    assert "step 5: a 3.8000 (1.2500 bits/byte)" in shown


def test_a_run_under_way(trained: tuple[RunDir, MadeUpRun]) -> None:
    """Its launcher holds the lock; each look reads what is new."""
    run, made = trained
    watched = WatchedRun(run.path)
    assert watched.look().state == "lost"
    with open(run.lock_path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = watched.look()
        assert found.state == "training"
        assert found.eta_seconds == pytest.approx(3 * 2.0)
        assert found.tokens_per_second == pytest.approx(5.0)
        made.makes_step(2.0)
        with open(run.events_path, "a") as events:
            events.write(json.dumps(made.events[-1]) + "\n" + '{"type": "step", "st')  # the next line is on its way
        assert watched.look().step == 6
        run.stop_path.touch()
        assert watched.look().state == "stopping"
        assert "the file stop asks for it" in watched.look().notes
    assert watched.look().state == "lost"


def test_looking_does_not_keep_a_run_from_starting(trained: tuple[RunDir, MadeUpRun]) -> None:
    """That would be so if it took the lock to see whether it is free."""
    run, _ = trained
    run.lock_path.touch()
    code = (
        "from pathlib import Path\nfrom launch.cluster.status import WatchedRun\n"
        f"w = WatchedRun(Path({str(run.path)!r}))\n"
    )
    looker = subprocess.Popen(
        [sys.executable, "-P", "-c", code + "print('up', flush=True)\nwhile True: w.look()"], stdout=-1
    )
    assert looker.stdout is not None
    try:
        looker.stdout.readline()
        for _ in range(2000):
            with open(run.lock_path, "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        looker.kill()
        looker.wait()
        looker.stdout.close()


def test_how_a_local_run_ended(trained: tuple[RunDir, MadeUpRun]) -> None:
    run, _ = trained
    Outcome("failed", 1, 5, "rank 1 was killed by SIGKILL").write(run)
    found = WatchedRun(run.path).look()
    assert (found.state, found.why) == ("failed", "rank 1 was killed by SIGKILL")
    assert [(row["ended"], row["why"]) for row in found.attempts] == [("failed", "rank 1 was killed by SIGKILL")]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run: config.yaml is missing in it"):
        WatchedRun(tmp_path)


def test_a_run_of_tokens_knows_what_is_left(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", "schedule={total_steps: null, warmup_steps: null, total_tokens: 100}")
    made = MadeUpRun(cluster=False, now=time.time() - 100)
    made.attempt(0, 4.0)
    made.events[0]["host"] = "elsewhere"  # on a shared file system, seconds ago
    for _ in range(4):
        made.makes_step(2.0)
    made.write_to(run)
    found = WatchedRun(run.path).look()
    assert (found.state, found.tokens, found.total_tokens) == ("training", 40, 100)
    assert found.eta_seconds == pytest.approx(12)
    assert "4, 40 of 100 tokens (40.0%)" in text_of(run_view(found))


def test_a_pending_job_and_its_end(slurm_here: Cluster, tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    job_id = Slurm().sbatch(SLEEP.format("#SBATCH --hold"))
    with_job(run, job_id)
    made = MadeUpRun(cluster=True, now=time.time() - 50)
    made.submitted(0.0)
    made.write_to(run)
    watched = WatchedRun(run.path)
    found = watched.look()
    assert (found.state, found.job_id) == ("queued", job_id)
    assert found.why.startswith("held: ")
    assert found.goodput is not None
    assert found.goodput.seconds["queued"] == pytest.approx(50, abs=20)
    assert cancel_run(run.path, now=False).done == "cancelled"
    wait_for("its end", lambda: watched.look().state == "cancelled")
    assert not run.stop_path.exists()
    assert cancel_run(run.path, now=False).done == "nothing"


def test_a_job_that_runs_is_asked_to_stop_or_killed(slurm_here: Cluster, tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    job_id = Slurm().sbatch(SLEEP.format(""))
    with_job(run, job_id)
    watched = WatchedRun(run.path)
    wait_for("its start", lambda: watched.look().state == "starting")
    assert watched.look().nodes[0].startswith("n")
    done = cancel_run(run.path, now=False)
    assert (done.done, run.stop_path.exists()) == ("asked", True)
    assert watched.look().state == "starting"
    assert cancel_run(run.path, now=True).done == "killed"
    wait_for("its end", lambda: watched.look().state == "cancelled")


def test_without_an_answer_from_slurm(
    trained: tuple[RunDir, MadeUpRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A squeue that hangs, as it does when the controller is dead: the files tell, after the time-out."""
    hangs = tmp_path / "bin" / "squeue"
    hangs.parent.mkdir()
    hangs.write_text("#!/bin/sh\nexec sleep 60\n")
    hangs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{hangs.parent}:{os.environ['PATH']}")
    run = folder(tmp_path / "job")
    made = MadeUpRun(cluster=True, now=time.time() - 50)
    made.submitted(1.0)
    made.attempt(0, 4.0)
    made.makes_step(2.0)
    made.write_to(run)
    with_job(run, "7")
    began = time.monotonic()
    found = WatchedRun(run.path, Slurm(timeout_seconds=1.0)).look()
    assert time.monotonic() - began < 10
    assert (found.state, found.step) == ("training", 1)
    assert found.notes[0].startswith("Slurm does not answer, so this is what the files say: squeue")
    assert "note" in text_of(run_view(found))
    monkeypatch.setattr("launch.cluster.cancel.Slurm", lambda: Slurm(timeout_seconds=1.0))
    with pytest.raises(SlurmError, match="no answer in 1 s.*the file .*/stop is written"):
        cancel_run(run.path, now=False)
    assert run.stop_path.exists()


def test_cancelling_what_is_no_job(trained: tuple[RunDir, MadeUpRun]) -> None:
    run, _ = trained
    with pytest.raises(ValueError, match="does not run on this machine: there is nothing to cancel"):
        cancel_run(run.path, now=False)
    with open(run.lock_path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="--now: .* is no job of Slurm's; press Ctrl-C"):
            cancel_run(run.path, now=True)
        assert cancel_run(run.path, now=False).done == "asked"
    assert run.stop_path.exists()


def test_a_sweep(slurm_here: Cluster, tmp_path: Path) -> None:
    """Slurm shows pending tasks together, which are two points here."""
    job_id = Slurm().sbatch(SLEEP.format("#SBATCH --array=0-2%1"))
    points = tuple(Point(f"{i}_lr={lr}", {"optimizer.lr": lr}) for i, lr in enumerate(("1e-3", "3e-4", "1e-4")))
    sweep = Sweep(tmp_path, job_id, points)
    sweep.write()
    for i, point in enumerate(points):
        with_job(folder(tmp_path / point.name), f"{job_id}_{i}")
    watched = WatchedSweep(tmp_path)
    wait_for("the first", lambda: watched.look()[0].state == "starting")
    made = MadeUpRun(cluster=True, now=time.time())
    made.submitted(0.0)
    made.attempt(0, 4.0)
    made.makes_step(1.0)
    made.write_to(sweep.runs[0])
    found = watched.look()
    assert [one.state for one in found] == ["training", "queued", "queued"]
    assert not watched.is_over(found)
    told = watched.as_json(found)
    assert [row["best"] for row in told["points"]] == [True, False, False]
    shown = text_of(sweep_view(json.loads(json.dumps(told))))
    assert "0_lr=1e-3 *" in shown
    assert "optimizer.lr" in shown
    assert [done.done for done in cancel_sweep(tmp_path, now=True)] == ["killed", "cancelled", "cancelled"]
    wait_for("their end", lambda: watched.is_over(watched.look()))


def test_which_jobs_a_line_of_squeue_is_about() -> None:
    line = Job("12_[1,4-7%2]", "12", "1,4-7%2", "PENDING", 1, None, None, "", "None")
    assert [task for task in range(10) if is_of(line, f"12_{task}")] == [1, 4, 5, 6, 7]
    assert is_of(line, "12")
    assert not is_of(line, "1")
    cancelled = [
        Job("12_1", "12", "1", "FAILED", 1, None, None, "", "None"),
        Job("12_[2-9]", "12", "2-9", "CANCELLED", 1, None, None, "", ""),
    ]
    assert SlurmView(cancelled).last_word == "CANCELLED"
    assert SlurmView(cancelled).of_job("12_1").last_word == "FAILED"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0512, "0.0512 s"), (48.2, "48 s"), (754, "12 min"), (12_345, "3 h 25 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
