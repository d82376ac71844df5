"""`steppe status`, `logs` and `cancel` as they are typed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launch.cli import app
from launch.cluster.sweep import Point, Sweep
from pretrain.recipe import dump_config
from pretrain.run_dir import RunDir
from tests.small_run import small_config
from tests.unit.launch.history_of_a_run import MadeUpRun

RUNNER = CliRunner()


def steppe(*words: object) -> Result:
    return RUNNER.invoke(app, [str(word) for word in words])


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """5 steps of 8, and killed."""
    run = RunDir(tmp_path / "run")
    run.logs.mkdir(parents=True)
    dump_config(small_config(), run.config_path)
    made = MadeUpRun(cluster=False, now=time.time() - 2000)
    made.attempt(0, 4.0)
    for _ in range(5):
        made.makes_step(2.0)
    made.write_to(run)
    run.rank_log(0).write_text("".join(f"line {i}\n" for i in range(300)))
    run.rank_log(1).write_text("of rank 1\n")
    return run


def test_status(run: RunDir) -> None:
    told = json.loads(steppe("status", run.path, "--json").stdout)
    assert (told["state"], told["step"], told["total_steps"]) == ("lost", 5, 8)
    assert sum(told["goodput"]["shares"].values()) == pytest.approx(1)
    shown = steppe("status", run.path).stdout
    assert "5 of 8" in shown
    assert "killed" in shown
    assert "5 of 8" in steppe("status", run.path, "--watch").stdout  # it ends, since the run has
    assert "--json does not go with --watch" in str(steppe("status", run.path, "--json", "--watch").exception)


def test_status_of_a_sweep(run: RunDir) -> None:
    folder = run.path.parent
    Sweep(folder, None, (Point("run", {"seed": "0"}),)).write()
    (point,) = json.loads(steppe("status", folder, "--json").stdout)["points"]
    assert (point["values"], point["state"], point["best"]) == ({"seed": "0"}, "lost", False)
    assert "seed" in steppe("status", folder).stdout


def test_logs(run: RunDir) -> None:
    assert steppe("logs", run.path, "--lines", 2).stdout == "line 298\nline 299\n"
    assert len(steppe("logs", run.path).stdout.splitlines()) == 100
    assert len(steppe("logs", run.path, "--lines", 0).stdout.splitlines()) == 300
    assert steppe("logs", run.path, "--rank", 1, "--follow").stdout == "of rank 1\n"
    assert "has no log of it; there are ranks 0 to 1" in str(steppe("logs", run.path, "--rank", 2).exception)
    for number in (1, 2):
        (run.logs / f"job_{number}.log").write_text(f"of job {number}\n")
    assert steppe("logs", run.path).stdout == "==> job_1.log <==\nof job 1\n==> job_2.log <==\nof job 2\n"


def test_logs_stop_when_nobody_reads(run: RunDir) -> None:
    run.rank_log(0).write_text("x" * 10_000_000)
    command = [sys.executable, "-P", "-m", "launch.cli", "logs", str(run.path), "--lines", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reading:
        assert reading.stdout is not None
        assert reading.stderr is not None
        reading.stdout.read(10)
        reading.stdout.close()
        assert reading.stderr.read() == b""
        assert reading.wait() == 0


def test_cancel_what_has_ended(run: RunDir) -> None:
    assert "there is nothing to cancel" in str(steppe("cancel", run.path).exception)


@pytest.mark.parametrize("name", ["status", "logs", "cancel"])
def test_on_a_login_node(run: RunDir, name: str) -> None:
    """Nothing heavy is imported, and so the answer comes at once."""
    code = (
        "import sys\nfrom launch.cli import app\n"
        f"try: app([{name!r}, {str(run.path)!r}])\nexcept (SystemExit, ValueError): pass\n"
        "print([name for name in ('torch', 'deepspeed', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"
