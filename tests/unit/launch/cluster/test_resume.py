"""Going on with a run by another job, with today's code; and when that is refused."""

import json
from pathlib import Path

import pytest

from launch.cluster.record import JobRecord, read_attempts
from launch.cluster.resume import Again, check_not_finished, resume
from launch.cluster.slurm import Slurm
from launch.run import resume as resume_here
from pretrain.recipe import load_config
from pretrain.run_dir import RunDir
from tests.slurm.cluster import Cluster, wait_for
from tests.tiny_run import write_run
from tests.unit.launch.cluster.conftest import Submit, WriteProfile, probe

pytestmark = pytest.mark.slow


def test_on_other_nodes_and_by_todays_code(
    submit: Submit, write_profile: WriteProfile, slurm_here: Cluster, tmp_path: Path
) -> None:
    run, profile = RunDir(tmp_path / "run"), write_profile(setup=["sleep 1"])
    first = json.loads(submit("--cluster", profile, "--nodes", 2, "--run-dir", run.path, "--json").stdout)["job_id"]
    with pytest.raises(
        ValueError, match=f"has job {first} in the queue .*: wait for it, or end it with `steppe cancel"
    ):
        resume(run.path, [], [], Again(nodes=1))
    with pytest.raises(ValueError, match=f"has job {first} in the queue"):
        resume_here(run.path, [], [], 2, None)
    probe(run.path)
    wait_for("its end", lambda: all(job.is_over for job in Slurm().squeue(first)))
    (run.code / "launch" / "cluster" / "job.py").unlink()
    profile.write_text("partition: nowhere")  # what the profile says by now does not matter
    old = JobRecord.read(run)
    old.model_copy(update={"exclude": ("n1",)}).write(run)
    script = run.script_path.read_text()
    with pytest.raises(ValueError, match="batch.global_batch_size=8 is not a multiple of .* 6 data-parallel ranks"):
        resume(run.path, [], [], Again(nodes=3))
    with pytest.raises(ValueError, match="nodes 0: give a number"):
        resume(run.path, [], [], Again(nodes=0))
    assert run.script_path.read_text() == script
    record = resume(run.path, ["optimizer.lr=1e-3"], [], Again(nodes=1, time_limit="20"))
    assert (record.nodes, record.ranks, record.time_limit, record.profile) == (1, 2, "20", old.profile)
    assert (record.exclude, record.job_ids[:1], len(record.job_ids)) == ((), (first,), 2)
    assert (run.code / "launch" / "cluster" / "job.py").is_file()
    assert [line["why"] for line in read_attempts(run, "submitted")] == ["submit", "resume"]
    assert load_config(run.config_path).optimizer.lr == 1e-3
    Slurm().cancel(str(record.job_id))


def test_a_complete_run_takes_no_nodes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=(10, 30))
    config = load_config(run.config_path)
    with pytest.raises(ValueError, match="is complete at step 30: to train for longer, raise schedule.total_steps"):
        check_not_finished(config, run)
    longer = config.schedule.model_copy(update={"total_steps": 31})
    check_not_finished(config.model_copy(update={"schedule": longer}), run)
    check_not_finished(config, RunDir(tmp_path / "new"))


def test_a_run_that_had_no_job(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has had no job yet: say where and how large, with --cluster and --nodes"):
        Again(nodes=2).record(RunDir(tmp_path))
    assert Again(cluster="cpu", nodes=2).record(RunDir(tmp_path)).ranks == 4
