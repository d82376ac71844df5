"""The virtual cluster of tests/slurm, for the tests here that need a real Slurm; a small profile; and a supervisor that
only tells what it sees."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cluster.freeze import FOLDERS, ROOT
from tests.conftest import Corpus, environment
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import cluster, slurm, started_cluster

__all__ = ["cluster", "slurm", "started_cluster"]

WriteProfile = Callable[..., Path]


@pytest.fixture
def slurm_here(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Slurm's commands of this process, and of those that it starts, speak to the virtual cluster."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    return cluster


@pytest.fixture
def write_profile(tmp_path: Path) -> WriteProfile:
    """Write a profile of the virtual cluster with further fields; returns its path."""

    def write(**fields: Any) -> Path:
        path = tmp_path / "virtual.yaml"
        path.write_text(yaml.safe_dump({"partition": "main", "time_limit": "10", "ranks_per_node": 2, **fields}))
        return path

    return write


# In place of the supervisor: writes down its place, its environment and the code that it is.
PROBE = """
import json, os, sys
from pathlib import Path
told = {"mark": "MARK", "file": __file__, "argv": sys.argv[1:], "python": sys.executable, "folder": os.getcwd()}
number = os.environ.get("SLURM_ARRAY_TASK_ID", "0")
path = Path(sys.argv[1]) / f"probe_{number}.json"
path.with_suffix(".tmp").write_text(json.dumps({**told, "environment": dict(os.environ)}))
path.with_suffix(".tmp").rename(path)
print("probed")
"""
Submit = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkout of our packages whose supervisor is the probe."""
    root = tmp_path / "source"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "launch" / "cluster" / "job.py").write_text(PROBE)
    return root


@pytest.fixture
def submit(source: Path, corpus: Corpus) -> Submit:
    """`steppe submit` of a small run, by the code in `source`; `code` is the exit code it must have."""

    def run(*words: object, code: int = 0, recipe: str = "58m", **variables: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-P", "-m", "launch.cli", "submit", recipe, *map(str, words), *corpus.settings()]
        done = subprocess.run(
            command,
            env={**environment(), "PYTHONPATH": str(source), **variables},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, f"exit code {done.returncode}, not {code}: {done.stdout}\n{done.stderr}"
        return done

    return run


def probe(run: Path, number: int = 0) -> dict[str, Any]:
    path = run / f"probe_{number}.json"
    wait_for(f"the job of {run}", path.is_file)
    return json.loads(path.read_text())
