"""The logs of a run: which files they are, the end of them, and what is added as long as the run goes on. No torch."""

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pretrain.run_dir import RunDir

JOB_LOG = re.compile(r"job_(\d+)(?:_\d+)?\.log")
POLL_SECONDS = 0.5
# How often, at most, the run is asked whether it is over: that is a question to Slurm.
STATE_SECONDS = 5.0
BLOCK_BYTES = 1 << 16


def log_files(run: RunDir, rank: int | None) -> list[Path]:
    """Oldest first: those of all jobs, or the one of a rank. A local run has no job: rank 0's stands for it."""
    if rank is not None:
        return [run.rank_log(rank)] if run.rank_log(rank).is_file() else []
    jobs = [path for path in run.logs.glob("job_*.log") if JOB_LOG.fullmatch(path.name)]
    jobs.sort(key=lambda path: int(JOB_LOG.fullmatch(path.name).group(1)))  # type: ignore[union-attr]
    return jobs or log_files(run, 0)


def missing_log(run: RunDir, rank: int | None) -> ValueError:
    """The refusal where there is no such log yet, or never will be."""
    if rank is None:
        return ValueError(f"{run.path} has no logs yet: it has not started (steppe status {run.path})")
    ranks = sorted(int(path.stem.removeprefix("rank_")) for path in run.logs.glob("rank_?????.log"))
    known = f"there are ranks {ranks[0]} to {ranks[-1]}" if ranks else "no rank has started yet"
    return ValueError(f"--rank {rank}: {run.path} has no log of it; {known}")


def last_lines(files: list[Path], count: int) -> list[tuple[Path, int]]:
    """From where in which of the files, oldest first, the last `count` lines of them all begin; 0: all lines."""
    if count == 0:
        return [(path, 0) for path in files]
    found: list[tuple[Path, int]] = []
    for path in reversed(files):
        start, lines = _last_lines_of(path, count)
        found.insert(0, (path, start))
        count -= lines
        if count <= 0:
            break
    return found


def _last_lines_of(path: Path, count: int) -> tuple[int, int]:
    """Where the last `count` lines of a file begin, and how many there are; read from its end."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        lines, block_start = 0, end
        while block_start > 0:
            block_end, block_start = block_start, max(0, block_start - BLOCK_BYTES)
            file.seek(block_start)
            block = file.read(block_end - block_start)
            at = len(block)
            while (at := block.rfind(b"\n", 0, at)) >= 0:
                if block_start + at + 1 < end:  # not the end of the last line, which nothing follows
                    lines += 1
                    if lines == count:
                        return block_start + at + 1, count
        return 0, lines + (1 if end else 0)


def read_on(
    find: Callable[[], list[Path]], starts: list[tuple[Path, int]], is_over: Callable[[], bool] | None
) -> Iterator[tuple[Path, bytes]]:
    """What the files hold from these places on, in pieces, each with its file.

    is_over: given, what is added is told as well, and what comes in new files of `find`, until the run is over.
    """
    places = dict(starts)
    passed_over = set(find()) - set(places)  # older than what was asked for
    asked = -STATE_SECONDS
    over = is_over is None
    while True:
        for path in find():
            if path not in passed_over:
                with open(path, "rb") as file:
                    file.seek(places.get(path, 0))
                    while piece := file.read(BLOCK_BYTES):
                        yield path, piece
                    places[path] = file.tell()
        if over:
            return
        assert is_over is not None
        if time.monotonic() - asked >= STATE_SECONDS:
            over, asked = is_over(), time.monotonic()  # once more round then, for its last words
        if not over:
            time.sleep(POLL_SECONDS)
