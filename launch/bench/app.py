"""`steppe bench`: what this machine does, beside what it does with the peers."""

import signal

import typer

from launch.bench.checkpoint import checkpoint
from launch.bench.data import data
from launch.bench.evaluation import evaluation
from launch.bench.memory import memory
from launch.bench.start import start
from launch.bench.train import train

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.command("train")(train)
app.command("memory")(memory)
app.command("checkpoint")(checkpoint)
app.command("data")(data)
app.command("eval")(evaluation)
app.command("start")(start)


@app.callback()  # without it, typer would take the only command for the whole
def bench() -> None:
    """Measure on this machine, in turn with peers."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: contenders are ended, folders removed
