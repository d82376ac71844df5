"""`steppe submit` on a real Slurm, with a supervisor that only tells what it sees; and what is refused before."""

import itertools
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from launch.cluster.record import JobRecord, read_attempts
from launch.cluster.slurm import Slurm
from launch.cluster.submit import resubmit
from launch.cluster.sweep import Sweep
from pretrain.run_dir import RunDir
from tests.conftest import Corpus, environment
from tests.slurm.cluster import Cluster, wait_for
from tests.unit.launch.cluster.conftest import PROBE, Submit, WriteProfile, probe

pytestmark = pytest.mark.slow

# ------------------------------------------------------------------------------------------ without a Slurm


def test_a_dry_run_without_slurm_prints_the_script_and_writes_nothing(
    submit: Submit, write_profile: WriteProfile, tmp_path: Path
) -> None:
    profile = write_profile()
    before = sorted(tmp_path.iterdir())
    words = ("--cluster", profile, "--nodes", 2, "--run-dir", tmp_path / "run", "--dry-run")
    done = submit(*words, PATH="/nowhere")
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=58m\n")
    assert done.stdout.endswith('exec "$python" -P -m launch.cluster.job "$run"\n')
    assert "steppe: not tested: sbatch is not on this machine" in done.stderr
    told = json.loads(submit(*words, "--json", PATH="/nowhere").stdout)
    assert told["script"] == done.stdout
    assert told["slurm"].startswith("not tested")
    assert sorted(tmp_path.iterdir()) == before


REFUSED = {
    "layout": (["--nodes", 3], {}, "is not a multiple of batch.micro_batch_size=2 times 6 data-parallel ranks"),
    "nodes": (["--nodes", 0], {}, "--nodes 0: give a number, 1 or more"),
    "chain": (["--chain", 0], {}, "--chain 0: give a number"),
    "gpus": (["--gpus-per-node", -1], {}, "--gpus-per-node -1: give a number"),
    "time": (["--time", "soon"], {}, "'soon' is no time limit"),
    "lead": (["--time", "5"], {}, "signal_lead_seconds=300 of the profile leaves nothing of a time limit of 5 (300 s)"),
    "profile": ([], {"partion": "x"}, "unknown key partion: did you mean partition?"),
    "archive": ([], {"staging": {"environment_archive": "/no/such.tar"}}, "/no/such.tar: there is no such file"),
    "mount": (
        ["--set", "data.sources=[{name: a, path: '/a,b'}]"],
        {"container": {"runtime": "pyxis", "image": "i"}},
        "/a,b cannot be mounted in a container",
    ),
    "folder": (["--run-dir", "a:b"], {}, "there must be no : in its path"),
    "newline": (["--run-dir", "a\nb"], {}, "must be one line of printable characters"),
    "recipe": (["--set", "optimizer.lrr=1"], {}, "unknown key optimizer.lrr: did you mean lr?"),
    "data": (["--set", "data.sources=[{name: a, path: /no/such}]"], {}, "/no/such"),
    "point": (["--sweep", "batch.micro_batch_size=2,3"], {}, "point 1_micro_batch_size=3 of the sweep: batch.global"),
    "both": (["--sweep", "seed=1,2", "--chain", 2], {}, "--chain 2 does not go with --sweep"),
    "parallel": (["--parallel", 2], {}, "--parallel does not go without --sweep"),
    "none": (["--sweep", "seed=1,2", "--parallel", 0], {}, "--parallel 0: give a number of points"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_found_before_anything_is_written(
    case: str, write_profile: WriteProfile, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, fields, message = REFUSED[case]
    profile = write_profile(**fields)
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-P", "-m", "launch.cli", "submit", "58m", "--cluster", str(profile), "--run-dir", "run"]
    done = subprocess.run(
        [*command, *corpus.settings(), *map(str, words)],
        env={**environment(), "PATH": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [profile]


def test_a_folder_with_anything_in_it_is_left_alone(
    submit: Submit, write_profile: WriteProfile, tmp_path: Path
) -> None:
    for sweep in ((), ("--sweep", "seed=1,2")):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "mine").write_text("")
        done = submit("--cluster", write_profile(), "--run-dir", tmp_path / "run", *sweep, code=2)
        assert "exists and is not empty" in done.stderr
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


# --------------------------------------------------------------------------------------------- with a Slurm


def test_a_job_that_slurm_would_refuse(
    submit: Submit, write_profile: WriteProfile, slurm_here: Cluster, tmp_path: Path
) -> None:
    words = ("--run-dir", tmp_path / "run", "--nodes", 1)
    done = submit("--cluster", write_profile(partition="nowhere"), *words, code=2)
    assert "Slurm would refuse this job: sbatch --test-only: sbatch: error: invalid partition" in done.stderr
    done = submit("--cluster", write_profile(slurm_timeout_seconds=0.001), *words, code=1)
    assert "no answer in 0.001 s" in done.stderr
    assert not (tmp_path / "run").exists()
    dry = submit("--cluster", write_profile(), *words, "--dry-run")
    assert "to start at" in dry.stderr


NASTY = 'it\'s "a" $(touch x) `touch x` run; touch x #%j & é*'


@pytest.mark.parametrize("staged", [False, True])
def test_an_edit_after_submission_changes_nothing(
    staged: bool, submit: Submit, source: Path, write_profile: WriteProfile, slurm_here: Cluster, tmp_path: Path
) -> None:
    """Nor do blanks, quotes and commands in names come through as anything but themselves."""
    folder = tmp_path / NASTY / "run"
    profile = write_profile(
        sbatch_options=["--hold", f"--comment={NASTY}"],
        environment={"NOTE": NASTY},
        setup=["export FROM_SETUP='two words'"],
        local_folder=f"{tmp_path}/local $SLURM_JOB_ID",
        cpus_per_rank=1,
        staging={} if staged else None,
    )
    told = json.loads(submit("--cluster", profile, "--nodes", 2, "--run-dir", folder, "--json").stdout)
    assert {key: told[key] for key in ("run_dir", "nodes", "ranks")} == {
        "run_dir": str(folder),
        "nodes": 2,
        "ranks": 4,
    }
    (source / "launch" / "cluster" / "job.py").write_text(PROBE.replace("MARK", "EDITED"))
    (source / "launch" / "cluster" / "record.py").write_text("raise SystemExit('edited')")
    slurm_here.ask("scontrol", "release", told["job_id"])
    seen = probe(folder)
    code = tmp_path / f"local {told['job_id']}" / "frozen" / "code" if staged else folder / "code"
    assert seen["mark"] == "MARK"
    assert seen["file"] == str(code / "launch" / "cluster" / "job.py")
    assert seen["argv"] == [str(folder)]
    assert seen["folder"] == str(folder)
    assert seen["python"] == sys.executable
    variables = seen["environment"]
    assert variables["NOTE"] == NASTY
    assert variables["FROM_SETUP"] == "two words"
    assert variables["PYTHONPATH"] == str(code)
    assert variables["TRITON_CACHE_DIR"] == f"{tmp_path}/local {told['job_id']}/triton"
    assert variables["TORCH_FR_DUMP_TEMP_FILE"] == f"{folder}/logs/flight_recorder_"
    assert variables["OMP_NUM_THREADS"] == "1"
    assert not list(tmp_path.rglob("x"))
    wait_for("the log", lambda: "probed" in (folder / "logs" / f"job_{told['job_id']}.log").read_text())
    record = JobRecord.read(RunDir(folder))
    assert record.job_ids == (told["job_id"],)
    assert record.environment["NOTE"] == variables["NOTE"]
    (line,) = read_attempts(RunDir(folder))
    assert (line["type"], line["job_id"], line["why"]) == ("submitted", told["job_id"], "submit")
    assert (line["nodes"], line["ranks"], line["cluster"]) == (2, 4, "virtual")


def test_an_environment_goes_to_local_disk_or_stays_where_it_is(
    submit: Submit, write_profile: WriteProfile, slurm_here: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "env" / "bin").mkdir(parents=True)
    wrapper = tmp_path / "env" / "bin" / "python"
    wrapper.write_text(f'#!/bin/bash\nexport STAGED="$0"\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    archives = {"good": tmp_path / "good.tar", "bad": tmp_path / "bad.tar"}
    with tarfile.open(archives["good"], "w") as tar:
        tar.add(tmp_path / "env", arcname=".")
    archives["bad"].write_text("no tar file")
    for name, archive in archives.items():
        profile = write_profile(
            staging={"code": False, "environment_archive": str(archive)}, local_folder=f"{tmp_path}/$SLURM_JOB_ID"
        )
        done = submit("--cluster", profile, "--nodes", 2, "--run-dir", tmp_path / name, "--json")
        job_id = json.loads(done.stdout)["job_id"]
        seen, log = probe(tmp_path / name), (tmp_path / name / "logs" / f"job_{job_id}.log").read_text()
        staged = str(tmp_path / job_id / "python" / "bin" / "python") if name == "good" else None
        assert seen["environment"].get("STAGED") == staged
        assert ("the environment could not be staged, and is read where" in log) == (name == "bad")


def test_chained_jobs_run_one_after_another(
    submit: Submit, write_profile: WriteProfile, slurm_here: Cluster, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    profile = write_profile(requeue=False, setup=["sleep 2"])
    lone = submit("--cluster", profile, "--run-dir", run, "--dry-run")
    assert "requeue: false, so the run ends with its first job; --chain N" in lone.stderr
    told = json.loads(submit("--cluster", profile, "--run-dir", run, "--chain", 3, "--json").stdout)
    tasks = [probe(run, number)["environment"] for number in (1, 2, 3)]
    assert {task["SLURM_ARRAY_JOB_ID"] for task in tasks} == {told["job_id"]}
    assert JobRecord.read(RunDir(run)).chain == 3
    wait_for("all to end", lambda: all(job.is_over for job in Slurm().squeue(told["job_id"])))
    times = sorted((job.start_time, job.end_time) for job in Slurm().squeue(told["job_id"]))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(times))  # type: ignore[operator]


def test_a_sweep_is_one_array_with_a_run_for_each_point(
    submit: Submit, write_profile: WriteProfile, slurm_here: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "a sweep"
    words = ("--sweep", "optimizer.lr=1e-3,3e-4", "--sweep", "seed=0,1", "--parallel", 2, "--json")
    told = json.loads(submit("--cluster", write_profile(), "--run-dir", folder, *words).stdout)
    sweep = Sweep.read(folder)
    assert (sweep.job_id, len(sweep.runs)) == (told["job_id"], 4)
    assert told["points"] == [str(run.path) for run in sweep.runs]
    for number, (run, point) in enumerate(zip(sweep.runs, sweep.points, strict=True)):
        seen = probe(run.path, number)
        assert seen["argv"] == [str(run.path)]
        assert seen["file"] == str(run.code / "launch" / "cluster" / "job.py")
        config = yaml.safe_load(run.config_path.read_text())
        assert (config["seed"], config["optimizer"]["lr"]) == (
            int(point.values["seed"]),
            float(point.values["optimizer.lr"]),
        )
        record = JobRecord.read(run)
        assert (record.job_id, record.sweep) == (f"{told['job_id']}_{number}", str(folder))
        log = run.logs / f"job_{seen['environment']['SLURM_JOB_ID']}.log"
        wait_for("its log", lambda log=log: "probed" in log.read_text())


def test_a_run_is_submitted_again_without_its_bad_nodes(
    submit: Submit, write_profile: WriteProfile, slurm_here: Cluster, tmp_path: Path
) -> None:
    """After the job that asks for it, and with the code of the day when it was first submitted."""
    run = RunDir(tmp_path / "run")
    profile = write_profile(setup=["sleep 2"])
    first = json.loads(submit("--cluster", profile, "--nodes", 2, "--run-dir", run.path, "--json").stdout)["job_id"]
    record = resubmit(run, "bad nodes n1,n2", exclude=["n1", "n2"], signal_lead_seconds=77, after=first)
    assert (record.exclude, record.job_ids[0], len(record.job_ids)) == (("n1", "n2"), first, 2)
    assert JobRecord.read(run) == record
    second = str(record.job_id)
    wait_for("both", lambda: all(job.is_over for job in Slurm().squeue(first, second)))
    before, after = (Slurm().squeue(job)[0] for job in (first, second))
    assert before.end_time is not None
    assert after.start_time is not None
    assert before.end_time <= after.start_time
    assert Slurm().hostnames(after.node_list) == ["n3", "n4"]
    script = run.script_path.read_text()
    assert "#SBATCH --exclude=n1,n2\n" in script
    assert "#SBATCH --signal=B:USR1@77\n" in script
    assert [line["why"] for line in read_attempts(run, "submitted")] == ["submit", "bad nodes n1,n2"]


def test_the_submitters_variables_of_other_jobs_stay_behind(
    submit: Submit, write_profile: WriteProfile, slurm_here: Cluster, tmp_path: Path
) -> None:
    strays = {"SBATCH_PARTITION": "nowhere", "CUDA_VISIBLE_DEVICES": "7", "WORLD_SIZE": "9"}
    submit("--cluster", write_profile(), "--run-dir", tmp_path / "run", **strays, HOME_OF_MINE="kept")
    seen = probe(tmp_path / "run")["environment"]
    assert not strays.keys() & seen.keys()
    assert seen["HOME_OF_MINE"] == "kept"
    assert seen["PATH"] == os.environ["PATH"]
