"""The house rules that a machine can check: imports go one way, configs and help are free of torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "launch": {"launch", "pretrain", "model", "data_pipeline"},
    "pretrain": {"pretrain", "model", "data_pipeline"},
    "model": {"model"},
    "data_pipeline": {"data_pipeline"},
}
# The files that pytest comes to, a line each, without importing them: that would take half a minute.
COLLECTED = """
import pytest

class Paths:
    def pytest_collect_file(self, file_path):
        print(file_path)

pytest.main(["--collect-only", "-q", "-p", "no:python", "-p", "no:cacheprovider"], plugins=[Paths()])
"""
SOURCES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            found.add((node.module or "").split(".")[0])
    return found


def test_imports_go_one_way() -> None:
    assert len(SOURCES) > 40
    for path in SOURCES:
        package = path.relative_to(ROOT).parts[0]
        ours = imported(path) & set(MAY_IMPORT)
        assert ours <= MAY_IMPORT[package], f"{path} imports {ours - MAY_IMPORT[package]}"


def test_deepspeed_stays_behind_its_engine() -> None:
    users = {path.relative_to(ROOT).as_posix() for path in SOURCES if "deepspeed" in imported(path)}
    own = {"pretrain/engine_deepspeed.py", "pretrain/deepspeed_zero.py", "pretrain/deepspeed_reduction.py"}
    assert users == {*own, "pretrain/device.py"}


def test_one_file_names_devices_and_backends() -> None:
    words = ("torch.cuda", '"cuda"', '"cpu"', '"nccl"', '"gloo"', "'cuda'", "'cpu'")
    users = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(word in path.read_text() for word in words) and path.parts[-2] == "pretrain"
    }
    # The others name "cpu" as where offloaded state or weights wait, as DeepSpeed and accelerate do.
    assert users == {"pretrain/device.py", "pretrain/config.py", "pretrain/memory.py", "pretrain/offload.py"}


def test_init_files_are_empty() -> None:
    assert all(not path.read_text() for path in SOURCES if path.name == "__init__.py")


@pytest.mark.parametrize(
    "module",
    [
        "launch.cli",
        "launch.run",
        "launch.cluster.submit",
        "launch.cluster.resume",
        "launch.cluster.status",
        "launch.cluster.job",
        "launch.plan",
        "pretrain.config",
        "pretrain.recipe",
        "pretrain.schedule",
        "model.config",
    ],
)
def test_login_node_modules_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'deepspeed', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_imports_no_torch_and_no_numpy() -> None:
    code = (
        "import sys, runpy; sys.argv = ['steppe', '--help']\n"
        "try: runpy.run_module('launch.cli', run_name='__main__')\n"
        "except SystemExit: print([m for m in ('torch', 'numpy', 'pydantic', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "resume" in done.stdout


def test_pytest_collects_every_test_file() -> None:
    """Neither pytest's defaults nor an ignored folder hides tests: `dist` is a name that both know."""
    done = subprocess.run([sys.executable, "-c", COLLECTED], cwd=ROOT, capture_output=True, text=True, check=False)
    collected = set(done.stdout.splitlines())
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert str(path) in collected, done.stdout + done.stderr
