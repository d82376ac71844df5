"""How ranks are started in a container, and what they see of the disk."""

import sys
from pathlib import Path
from typing import Any

import pytest

from launch.cluster.container import CODE, LOCAL_FOLDER, folders, rank_command
from launch.cluster.profile import ClusterProfile
from launch.cluster.record import JobRecord
from pretrain.recipe import dump_config
from pretrain.run_dir import RunDir
from tests.small_run import small_config

WORDS = ["-P", "-m", "launch.cluster.rank"]


def record(gpus: int = 0, **container: Any) -> JobRecord:
    profile = ClusterProfile.model_validate({"container": container or None})
    return JobRecord(
        cluster="here", profile=profile, nodes=1, gpus_per_node=gpus, ranks_per_node=1, signal_lead_seconds=60
    )


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    run = RunDir(tmp_path / "a run")
    run.path.mkdir()
    dump_config(small_config("data.sources=[{name: a, path: /data/a}, {name: b, path: /data/a/b}]"), run.config_path)
    monkeypatch.setenv(CODE, str(run.code))
    monkeypatch.setenv(LOCAL_FOLDER, "/local/7")
    return run


def test_without_a_container(run: RunDir) -> None:
    assert rank_command(record(), run, WORDS) == ([], [sys.executable, *WORDS])


def test_apptainer(run: RunDir) -> None:
    options, command = rank_command(record(2, runtime="apptainer", image="i.sif", mounts=("/x:/y:ro",)), run, WORDS)
    assert options == []
    assert command[:3] == ["apptainer", "exec", "--nv"]
    assert command[-5:] == ["i.sif", "python3", *WORDS]
    assert [command[place + 1] for place, word in enumerate(command) if word == "--bind"] == [
        "/data/a:/data/a",
        "/local/7:/local/7",
        f"{run.path}:{run.path}",
        "/x:/y:ro",
    ]
    assert "--nv" not in rank_command(record(runtime="apptainer", image="i.sif"), run, WORDS)[1]


def test_pyxis(run: RunDir) -> None:
    options, command = rank_command(record(runtime="pyxis", image="i", python="/opt/python"), run, WORDS)
    assert command == ["/opt/python", *WORDS]
    assert options[0] == "--container-image=i"
    assert options[1] == f"--container-mounts=/data/a:/data/a,/local/7:/local/7,{run.path}:{run.path}"


def test_a_folder_within_another_is_there_with_it(run: RunDir) -> None:
    assert folders(run) == ["/data/a", "/local/7", str(run.path)]
