"""Whose a node's local folder is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster import preflight_rank
from launch.cluster.container import LOCAL_FOLDER
from launch.cluster.local_folder import problem_of_local_folder
from pretrain.run_dir import RunDir, read_json
from tests.required import lacking
from tests.unit.launch.cluster.test_rank import TASK

NOBODY = 65534


@pytest.fixture
def as_root() -> None:
    """A folder can be given away here."""
    if os.geteuid() != 0:
        lacking("it takes root to give a folder away")


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "a" / "local"
    monkeypatch.setenv(LOCAL_FOLDER, str(path))
    return path


def test_it_is_made_for_us_alone(local: Path) -> None:
    mask = os.umask(0)
    try:
        assert problem_of_local_folder() == ""
    finally:
        os.umask(mask)
    assert local.stat().st_mode & 0o777 == 0o700
    (local / "cache").mkdir()
    assert problem_of_local_folder() == "", "the next attempt finds its caches"
    assert (local / "cache").is_dir()


def test_without_one_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LOCAL_FOLDER, raising=False)
    assert problem_of_local_folder() == ""


@pytest.mark.usefixtures("as_root")
def test_another_users_is_refused(local: Path) -> None:
    local.mkdir(parents=True)
    os.chown(local, NOBODY, NOBODY)
    said = problem_of_local_folder()
    assert said == f"local_folder {local} belongs to another user (id 65534), whose code could run in its place"
    assert preflight_rank.problem_of_node(local, 0.0, 0) == said, "and so is the node"


@pytest.mark.usefixtures("as_root")
def test_nor_is_another_users_link_followed(local: Path) -> None:
    local.parent.mkdir()
    (local.parent / "mine").mkdir(mode=0o700)
    local.symlink_to(local.parent / "mine")
    assert problem_of_local_folder() == "", "one's own is"
    os.chown(local, NOBODY, NOBODY, follow_symlinks=False)
    assert "belongs to another user" in problem_of_local_folder()


def test_nor_what_others_may_write_to(local: Path) -> None:
    local.mkdir(parents=True)
    local.chmod(0o770)
    assert "can be written by others (mode 770)" in problem_of_local_folder()


def test_a_file_in_its_place(local: Path) -> None:
    local.parent.mkdir()
    local.touch()
    assert problem_of_local_folder() == f"local_folder {local}: File exists"


def test_a_rank_does_not_run_there_without_a_preflight_either(local: Path, tmp_path: Path) -> None:
    local.mkdir(parents=True)
    local.chmod(0o777)
    run = RunDir(tmp_path)
    run.logs.mkdir()
    words = [sys.executable, "-P", "-m", "launch.cluster.rank", str(run.path)]
    environment = {**os.environ, **TASK, "SLURMD_NODENAME": "n2"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    told = read_json(run.rank_error(5))
    assert told["message"].startswith("n2 is a bad node: local_folder")
    assert told["exit_code"] == 1, "another node may have a better one"
