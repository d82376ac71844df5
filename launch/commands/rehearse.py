"""What `steppe train --rehearse` is asked and shows; `launch/rehearse.py` does it."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

if TYPE_CHECKING:
    from launch.rehearsal_report import Report

GPUS_OF_A_NODE = 8


def rehearse(
    recipe: str,
    overrides: list[str],
    run_dir: Path | None,
    nodes: int | None,
    gpus_per_node: int | None,
    ranks: int | None,
    as_json: bool,
) -> NoReturn:
    """Rehearse a recipe, show how it went, and leave with its exit code. Ranks: as given, or the fewest it takes."""
    from launch.rehearse import rehearse as run
    from launch.run_folder import recipe_path
    from launch.shrink import fewest_ranks
    from pretrain.recipe import load_config

    for flag, number in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node), ("--ranks", ranks)):
        if number is not None and number < 1:
            raise ValueError(f"{flag} {number}: give a number of 1 or more")
    if ranks is not None and (nodes or gpus_per_node):
        raise ValueError("--ranks says what --nodes and --gpus-per-node say: give one or the other")
    config = load_config(recipe_path(recipe), overrides)
    if nodes or gpus_per_node:
        ranks = (nodes or 1) * (gpus_per_node or GPUS_OF_A_NODE)
    if ranks is None:
        ranks = fewest_ranks(config)
        said = "the fewest that hold its degrees; say how many it is meant for with --nodes and --gpus-per-node"
        print(f"rehearsing a run of {ranks} rank{'s' * (ranks > 1)}, {said}", file=sys.stderr)
    report = run(config, ranks, run_dir)
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        _print_tables(report)
    raise typer.Exit(report.exit_code)


def _print_tables(report: "Report") -> None:
    from rich.console import Console
    from rich.table import Table

    from pretrain.outcome import EXIT_STOPPED

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    world = report.full.world
    title = f"{report.config.name}, a run of {world:,} rank{'s' * (world > 1)}, rehearsed on {report.small.world}"
    stages = Table(title=title, title_justify="left")
    stages.add_column("stage", no_wrap=True)
    stages.add_column("", no_wrap=True)
    stages.add_column("result", overflow="fold")
    stages.add_column("s", justify="right")
    for stage in report.stages:
        verdict = "[red]failed[/]" if stage.exit_code else "[green]ok[/]"
        stages.add_row(stage.name, verdict, stage.said.replace("[", r"\["), f"{stage.seconds:.0f}")
    console.print(stages)

    changed = Table(title="What was changed for it", title_justify="left")
    changed.add_column("setting", no_wrap=True)
    changed.add_column("run", justify="right", overflow="fold")
    changed.add_column("rehearsal", justify="right", overflow="fold")
    for key, full, rehearsed in report.differences:
        changed.add_row(key, _shown(full), _shown(rehearsed))
    console.print(changed)

    console.print("What was not rehearsed", style="italic")
    for line in report.not_rehearsed:
        console.print(f"- {line}", markup=False)
    console.print()
    if report.exit_code:
        kept = f" Its folder is kept: {report.folder}" if report.folder else ""
        how = "was stopped" if report.exit_code == EXIT_STOPPED else "failed"
        console.print(f"The rehearsal {how} at: {report.stages[-1].name}.{kept}", markup=False, soft_wrap=True)
    else:
        kept = f" Its folder: {report.folder}" if report.folder else ""
        console.print(f"The rehearsal went well.{kept}", markup=False, soft_wrap=True)


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("[", r"\[")
