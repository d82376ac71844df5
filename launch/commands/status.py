"""`steppe status`, `logs` and `cancel`: looking after a run, on a login node. No torch."""

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console, RenderableType

    Look = Callable[[], tuple[dict[str, Any], bool, Callable[[], RenderableType]]]

Folder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of a sweep.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
WATCH_SECONDS = 2.0


def status(
    run: Folder,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every 2 s, until the run has ended.")] = False,
) -> None:
    """What a run does: state, step, loss, speed, what is left, its attempts and why they ended, goodput.

    Of a sweep: its points, compared."""
    if as_json and watch:
        raise ValueError("--json does not go with --watch: it is one object; call it again instead")
    look = _watched(run)
    if watch:
        _watch(look)
        return
    described, _, view = look()
    if as_json:
        print(json.dumps(described))
    else:
        _console().print(view())


def logs(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    rank: Annotated[int | None, typer.Option(min=0, help="The log of a rank instead of the job's.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on, over restarts, until the run has ended.")] = False,
    lines: Annotated[int, typer.Option(min=0, help="How many of the last lines; 0: all of them.")] = 100,
) -> None:
    """What a run has written: the logs of its jobs (of a local run: rank 0's), or of one rank."""
    from launch.cluster.logs import last_lines, log_files, missing_log, read_on
    from launch.cluster.run_state import OVER
    from launch.cluster.status import WatchedRun

    watched = WatchedRun(run)
    files = log_files(watched.run, rank)
    if not files and not follow:
        raise missing_log(watched.run, rank)
    told: Path | None = None
    pieces = read_on(
        lambda: log_files(watched.run, rank),
        last_lines(files, lines),
        (lambda: watched.look().state in OVER) if follow else None,
    )
    try:
        for path, piece in pieces:
            if path != told and (told is not None or len(files) > 1):
                sys.stdout.buffer.write(f"==> {path.name} <==\n".encode())
            told = path
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
    except (KeyboardInterrupt, BrokenPipeError):  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def cancel(
    run: Folder,
    now: Annotated[bool, typer.Option("--now", help="By scancel: a checkpoint only if it fits into KillWait.")] = False,
    as_json: AsJson = False,
) -> None:
    """End a run, or all of a sweep, for good.

    What waits in the queue is cancelled; what runs checkpoints first, however long that takes."""
    from launch.cluster.cancel import cancel_run, cancel_sweep

    done = cancel_sweep(run, now) if _is_sweep(run) else [cancel_run(run, now)]
    if as_json:
        print(json.dumps({"runs": [{"run": one.run, "job_id": one.job_id, "done": one.done} for one in done]}))
    for one in done:
        print(f"steppe: {one.words}", file=sys.stderr)


def _watched(path: Path) -> "Look":
    """How to look at a run or a sweep: its JSON values, whether it has ended, and how it is shown."""
    from launch.cluster.run_state import OVER
    from launch.cluster.status import WatchedRun
    from launch.status_view import run_view, sweep_view

    if _is_sweep(path):
        from launch.cluster.sweep_status import WatchedSweep

        sweep = WatchedSweep(path)

        def look_at_all() -> tuple[dict[str, Any], bool, "Callable[[], RenderableType]"]:
            points = sweep.look()
            described = sweep.as_json(points)
            return described, sweep.is_over(points), lambda: sweep_view(described)

        return look_at_all
    run = WatchedRun(path)

    def look() -> tuple[dict[str, Any], bool, "Callable[[], RenderableType]"]:
        found = run.look()
        return found.as_json(), found.state in OVER, lambda: run_view(found)

    return look


def _is_sweep(path: Path) -> bool:
    if (path / "config.yaml").is_file():  # a run: nothing else need be imported
        return False
    from launch.run_folder import SWEEP_NAME

    return (path / SWEEP_NAME).is_file()


def _watch(look: "Look") -> None:
    """A table that is drawn anew until the end; where stdout is no terminal, only the last."""
    from rich.live import Live

    _, over, view = look()
    with Live(view(), console=_console(), auto_refresh=False) as live:
        try:
            while not over:
                time.sleep(WATCH_SECONDS)
                _, over, view = look()
                live.update(view(), refresh=True)
        except KeyboardInterrupt:
            return


def _console() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)
