"""`steppe bench`: what this machine does, beside what it does with the peers."""

import typer

from launch.bench.train import train

app = typer.Typer(no_args_is_help=True, help="Measure on this machine, in turn with peers.", rich_markup_mode=None)
app.command("train")(train)


@app.callback()
def bench() -> None:
    """Keeps `train` a subcommand while it is the only one."""
