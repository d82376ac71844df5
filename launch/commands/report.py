"""`steppe report`."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of a sweep.")],
    out: Annotated[Path | None, typer.Option(help="The page to write [default: report.html in the folder].")] = None,
) -> None:
    """Write one HTML page, readable without a network: losses, speed, restarts and why, goodput, data, checkpoints."""
    from launch.report import run_report, sweep_report
    from launch.run_folder import SWEEP_NAME

    page = sweep_report(run) if (run / SWEEP_NAME).is_file() else run_report(run)
    path = out or run / "report.html"
    path.write_text(page, encoding="utf-8")
    print(f"steppe: {path}", file=sys.stderr)
