"""`steppe train` and `steppe resume`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pretrain.outcome import Outcome

Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key; VALUE is YAML. May be repeated.")
]
StopAfter = Annotated[
    int | None, typer.Option(help="End early after this step, with a checkpoint; the schedule is unchanged.")
]


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that comes with Steppe.")],
    run_dir: Annotated[Path | None, typer.Option(help="Folder of the run [default: runs/RECIPE].")] = None,
    nproc: Annotated[int | None, typer.Option(help="Ranks on this machine [default: one a GPU, else 1].")] = None,
    overrides: Overrides = [],  # noqa: B006
    stop_after: StopAfter = None,
) -> None:
    """Pretrain a model in a new run folder."""
    from launch.run import start

    folder = run_dir or Path("runs") / Path(recipe).stem
    report(start(recipe, overrides, folder, nproc, stop_after), folder)


def resume(
    run_dir: Annotated[Path, typer.Argument(help="Folder of the run.")],
    nproc: Annotated[int | None, typer.Option(help="Ranks on this machine [default: as before].")] = None,
    overrides: Overrides = [],  # noqa: B006
    allow: Annotated[list[str], typer.Option(metavar="KEY", help="Change a key that a resume refuses.")] = [],  # noqa: B006
    stop_after: StopAfter = None,
) -> None:
    """Go on with a run from its newest checkpoint."""
    from launch.run import resume as go_on

    report(go_on(run_dir, overrides, allow, nproc, stop_after), run_dir)


def report(outcome: "Outcome", run_dir: Path) -> None:
    """Say how the run ended and leave with its exit code."""
    hint = f"; go on with: steppe resume {run_dir}" if outcome.status == "stopped" else ""
    print(f"steppe: {outcome.message}{hint}", file=sys.stderr)
    raise typer.Exit(outcome.exit_code)
