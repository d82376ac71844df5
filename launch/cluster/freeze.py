"""A copy of Steppe's own code in the run's folder, which is what a job runs: an edit after submission changes nothing.

RUN/code/       the packages and slurm/
RUN/code.json   git revision, whether the checkout differed from it, and a hash of the copy
RUN/code.diff   how it differed, in the files that were copied; what git does not know yet included
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import xxhash

from pretrain.run_dir import RunDir, write_json

ROOT = Path(__file__).parents[2]
FOLDERS = ("launch", "pretrain", "model", "data_pipeline", "slurm")
NOT_CODE = ("__pycache__", "*.pyc", ".*")
GIT_SECONDS = 60


def freeze(run: RunDir, root: Path = ROOT) -> dict[str, Any]:
    """Copy the code of `root` into the run's folder, in place of a copy that is there; returns what code.json holds.

    Raises OSError where the disk does.
    """
    revision, diff = git_state(root)
    scratch, old = run.path / "code.tmp", run.path / "code.old"
    shutil.rmtree(scratch, ignore_errors=True)
    for folder in FOLDERS:
        shutil.copytree(root / folder, scratch / folder, ignore=shutil.ignore_patterns(*NOT_CODE))
    state = {
        "revision": revision,
        "dirty": None if diff is None else bool(diff),
        "hash": tree_hash(scratch),
        "frozen_from": str(root),
    }
    # A moment without the code is one in which a job that starts would fail: only renames lie between.
    shutil.rmtree(old, ignore_errors=True)
    if run.code.exists():
        run.code.rename(old)
    scratch.rename(run.code)
    shutil.rmtree(old, ignore_errors=True)
    (run.path / "code.diff").unlink(missing_ok=True)
    if diff:
        (run.path / "code.diff").write_bytes(diff.encode("utf-8", "surrogateescape"))
    write_json(run.path / "code.json", state)
    return state


def tree_hash(folder: Path) -> str:
    """xxh3-64 over the names and contents of a folder's files."""
    digest = xxhash.xxh3_64()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def git_state(root: Path) -> tuple[str | None, str | None]:
    """(revision, diff) of the checkout at `root`; None where there is none, as in a wheel, or no git.

    The diff is of FOLDERS, against the revision, with new files in full; "" if nothing differs.
    """

    def ask(*words: str, differs: bool = False) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=GIT_SECONDS,
            check=False,
        )
        if done.returncode > differs:  # a diff of two files that are not one repository's says 1 where they differ
            raise subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr)
        return done.stdout

    # A wheel may be installed inside somebody else's checkout: its revision is not ours.
    if not (root / ".git").exists():
        return None, None
    try:
        revision = ask("rev-parse", "HEAD").strip()
        diff = ask("diff", "--binary", "HEAD", "--", *FOLDERS)
        new = ask("ls-files", "-z", "--others", "--exclude-standard", "--", *FOLDERS).split("\0")
        for path in filter(None, new):
            diff += ask("diff", "--binary", "--no-index", "--", "/dev/null", path, differs=True)
    except (OSError, subprocess.SubprocessError):
        return None, None
    return revision, diff
