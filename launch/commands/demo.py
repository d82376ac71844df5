"""`steppe demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    directory: Annotated[
        Path, typer.Option("--dir", help="Folder to work in; an earlier demo there is replaced.")
    ] = Path("steppe-demo"),
    steps: Annotated[int, typer.Option(help="Optimizer steps of the run, stopped and resumed half-way.")] = 200,
    nproc: Annotated[int, typer.Option(help="Ranks on this machine.")] = 2,
) -> None:
    """The whole road on this machine's own text: tokenizer, shards, training, resume, perplexity, generation."""
    from launch.demo import run_demo

    run_demo(directory, steps, nproc)
