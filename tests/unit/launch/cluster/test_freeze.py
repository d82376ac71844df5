"""The frozen copy of the code, with where it came from."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from launch.cluster.freeze import FOLDERS, ROOT, freeze, tree_hash
from pretrain.run_dir import RunDir


def git(root: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", str(root), *identity, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small repository of the packages' names."""
    root = tmp_path / "checkout"
    for folder in FOLDERS:
        (root / folder / "inner").mkdir(parents=True)
        (root / folder / "a.py").write_text(f"NAME = '{folder}'\n")
        (root / folder / "inner" / "b.yaml").write_text("b: 1\n")
        (root / folder / "__pycache__").mkdir()
        (root / folder / "__pycache__" / "a.pyc").write_bytes(b"\0")
    (root / ".gitignore").write_text("__pycache__\n")
    (root / "notes.txt").write_text("no code\n")
    git(root.parent, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


def told(run: RunDir) -> dict[str, object]:
    return json.loads((run.path / "code.json").read_text())


def test_a_clean_checkout(checkout: Path, run: RunDir) -> None:
    (checkout / "notes.txt").write_text("changed, and no code\n")
    freeze(run, checkout)
    assert told(run) == {
        "revision": git(checkout, "rev-parse", "HEAD"),
        "dirty": False,
        "hash": tree_hash(run.code),
        "frozen_from": str(checkout),
    }
    assert not (run.path / "code.diff").exists()
    names = {path.relative_to(run.code).as_posix() for path in run.code.rglob("*") if path.is_file()}
    assert names == {f"{folder}/{name}" for folder in FOLDERS for name in ("a.py", "inner/b.yaml")}


def test_revision_and_diff_give_the_copy_again(checkout: Path, run: RunDir, tmp_path: Path) -> None:
    (checkout / "model" / "a.py").write_text("NAME = 'changed'\n")
    (checkout / "pretrain" / "new ünï.py").write_text("NEW = 1\n")
    (checkout / "slurm" / "inner" / "b.yaml").unlink()
    (checkout / "launch" / "blob.bin").write_bytes(bytes(range(256)))
    freeze(run, checkout)
    assert told(run)["dirty"] is True
    again = tmp_path / "again"
    git(tmp_path, "clone", "-q", str(checkout), str(again))
    git(again, "checkout", "-q", str(told(run)["revision"]))
    git(again, "apply", str(run.path / "code.diff"))
    for folder in FOLDERS:
        shutil.rmtree(again / folder / "__pycache__", ignore_errors=True)
        assert tree_hash(again / folder) == tree_hash(run.code / folder), folder


def test_later_edits_do_not_reach_it(checkout: Path, run: RunDir) -> None:
    freeze(run, checkout)
    before = tree_hash(run.code)
    (checkout / "model" / "a.py").write_text("NAME = 'changed'\n")
    assert tree_hash(run.code) == before == told(run)["hash"]
    freeze(run, checkout)  # a resume takes today's code
    assert tree_hash(run.code) == told(run)["hash"] != before
    assert {path.name for path in run.path.iterdir()} == {"code", "code.json", "code.diff"}


def test_without_a_checkout_as_in_a_wheel(checkout: Path, run: RunDir) -> None:
    git(checkout.parent, "init", "-q", str(checkout.parent))  # somebody else's checkout around it is not ours
    shutil.rmtree(checkout / ".git")
    freeze(run, checkout)
    assert (told(run)["revision"], told(run)["dirty"]) == (None, None)
    assert (run.code / "model" / "a.py").is_file()


def test_the_real_code_runs_from_its_copy(run: RunDir) -> None:
    state = freeze(run, ROOT)
    assert state["hash"] == tree_hash(run.code)
    assert (run.code / "slurm" / "pretrain.sbatch.j2").is_file()
