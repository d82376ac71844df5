"""`steppe checkpoint` as it is typed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launch.commands.checkpoint import app
from pretrain.checkpoint.folder import checkpoint_path, set_aside
from pretrain.run_dir import RunDir, event_line
from tests.checkpoint_edit import flip_bit
from tests.tiny_run import write_run

RUNNER = CliRunner()


def steppe(*arguments: object) -> Result:
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """With checkpoints of steps 10 and 20, and a validation at 20."""
    made = write_run(tmp_path / "run")
    scores = {"a": {"loss": 1.0}, "b": {"loss": 3.0}}
    made.events_path.write_text(event_line("evaluation", {"step": 20, "tokens": 0, "by_source": scores}))
    return made


def test_list(run: RunDir) -> None:
    shown = steppe("list", run.path)
    assert shown.exit_code == 0, shown.output
    assert "step_00000010" in shown.stdout
    assert "2.0000" in shown.stdout
    rows = json.loads(steppe("list", run.path, "--json").stdout)["checkpoints"]
    assert [(row["step"], row["state"], row["validation_loss"]) for row in rows] == [
        (10, "complete", None),
        (20, "complete", 2.0),
    ]
    assert rows[0]["size_bytes"] == (checkpoint_path(run.checkpoints, 10) / "rank-00000.safetensors").stat().st_size


def test_list_says_what_is_damaged_and_what_was_set_aside(run: RunDir) -> None:
    (checkpoint_path(run.checkpoints, 10) / "rank-00000.safetensors").unlink()
    set_aside(checkpoint_path(run.checkpoints, 20))
    shown = steppe("list", run.path, "--json")
    rows = json.loads(shown.stdout)["checkpoints"]
    assert [row["state"] for row in rows] == ["damaged", "set aside"]
    assert "rank-00000.safetensors is missing" in rows[0]["problem"]
    assert "rank-00000.safetensors is missing" in steppe("list", run.path).stderr


def test_verify(run: RunDir) -> None:
    verified = steppe("verify", run.path, "--json")
    assert verified.exit_code == 0
    assert [row["damages"] for row in json.loads(verified.stdout)["checkpoints"]] == [[], []]
    assert "every byte as it was written" in steppe("verify", checkpoint_path(run.checkpoints, 20)).stdout


@pytest.mark.parametrize(("name", "at"), [("rank-00000.safetensors", -4), ("rank-00000.safetensors", 9000)])
def test_verify_finds_a_bit(run: RunDir, name: str, at: int) -> None:
    flip_bit(checkpoint_path(run.checkpoints, 20) / name, at)
    found = steppe("verify", run.path)
    assert found.exit_code == 1
    assert f"step_00000020/{name} is damaged" in found.stderr
    assert steppe("verify", checkpoint_path(run.checkpoints, 10)).exit_code == 0


def test_show(run: RunDir) -> None:
    shown = json.loads(steppe("show", run.path, "--json").stdout)
    assert (shown["step"], shown["ranks"], shown["optimizer"]) == (20, 1, "adamw")
    assert shown["model"]["hidden_size"] == 32
    assert shown["values"] == sum(n * m for n, m in (s if len(s) == 2 else (*s, 1) for s in shown["shapes"].values()))
    assert "hidden_size 32" in steppe("show", checkpoint_path(run.checkpoints, 10)).stdout


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for command in ("list", "verify", "show"):
        refused = steppe(command, tmp_path)
        assert isinstance(refused.exception, ValueError)
        assert "is neither a run (config.yaml) nor a checkpoint (index.json)" in str(refused.exception)
        assert "missing does not exist" in str(steppe(command, tmp_path / "missing").exception)
    (tmp_path / "config.yaml").write_text("name: x")
    for command in ("list", "verify", "show"):
        assert "a run without a checkpoint" in str(steppe(command, tmp_path).exception)
