"""`steppe checkpoint list`, `verify` and `show`: looking after checkpoints."""

import itertools
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, verify and show checkpoints.")

Target = Annotated[Path, typer.Argument(metavar="PATH", help="A run, or one of its checkpoints.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
COMPLETE, DAMAGED, ASIDE = "complete", "damaged", "set aside"


@app.command("list")
def list_(path: Target, as_json: AsJson = False) -> None:
    """The checkpoints of a run, oldest first: step, tokens, size, and whether their files are all there and of their
    size (`verify` reads them)."""
    from pretrain.run_dir import RunDir
    from pretrain.validation import past_losses

    losses = past_losses(RunDir(path))
    rows = [_row(checkpoint, losses) for checkpoint in _checkpoints(path, with_damaged=True)]
    if as_json:
        print(json.dumps({"path": str(path), "checkpoints": rows}))
        return
    table = _table("checkpoint", "state")
    for header in ("step", "tokens", "ranks", "GB", "validation loss"):
        table.add_column(header, justify="right")
    for row in rows:
        numbers = [f"{row[key]:,}" if row[key] is not None else "" for key in ("step", "tokens", "ranks")]
        size = f"{row['size_bytes'] / 1e9:,.3f}" if row["size_bytes"] is not None else ""
        loss = f"{row['validation_loss']:.4f}" if row["validation_loss"] is not None else ""
        table.add_row(Path(row["path"]).name, row["state"], *numbers, size, loss)
    _print(path, table)
    for row in rows:
        if row["problem"]:
            print(f"steppe: {row['problem']}", file=sys.stderr)


@app.command("verify")
def verify(path: Target, as_json: AsJson = False) -> None:
    """Read every byte of a checkpoint, or of all of a run's, and compare it with the hashes of what was written.

    Exits with 1 if any is damaged.
    """
    from launch.byte_progress import ByteProgress
    from pretrain.checkpoint.verify import verify_checkpoint

    checkpoints = _checkpoints(path)
    sizes = [sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) for checkpoint in checkpoints]
    with ByteProgress("verifying", sum(sizes)) as line:
        damages = [verify_checkpoint(checkpoint, line.advance) for checkpoint in checkpoints]
    if as_json:
        results = [
            {"path": str(checkpoint), "size_bytes": size, "damages": found}
            for checkpoint, size, found in zip(checkpoints, sizes, damages, strict=True)
        ]
        print(json.dumps({"path": str(path), "checkpoints": results}))
    else:
        table = _table("checkpoint", "verdict")
        table.add_column("GB", justify="right")
        for checkpoint, size, found in zip(checkpoints, sizes, damages, strict=True):
            table.add_row(checkpoint.name, "damaged" if found else "every byte as it was written", f"{size / 1e9:,.3f}")
        _print(path, table)
    for damage in itertools.chain(*damages):
        print(f"steppe: {damage}", file=sys.stderr)
    raise typer.Exit(1 if any(damages) else 0)


@app.command("show")
def show(path: Target, as_json: AsJson = False) -> None:
    """What a checkpoint holds (of a run, its newest): the run's place, the model, and the layout that saved it."""
    from pretrain.checkpoint.index import read_index
    from pretrain.checkpoint.verify import describe
    from pretrain.choose_checkpoint import checkpoint_of

    problems: list[Exception] = []
    checkpoint = checkpoint_of(path, None, problems)
    for problem in problems:
        print(f"steppe: passed over: {problem}", file=sys.stderr)
    described = {"path": str(checkpoint), **describe(read_index(checkpoint))}
    if as_json:
        print(json.dumps(described))
        return
    table = _table("", "")
    table.show_header = False
    for key in ("step", "tokens", "position", "ranks", "boxes", "size_bytes", "values", "sequence_length"):
        if described[key] is not None:
            table.add_row(key.replace("_", " "), f"{described[key]:,}")
    for key in ("name", "precision", "optimizer", "tokenizer_fingerprint"):
        if described[key] is not None:
            table.add_row(key.replace("_", " "), str(described[key]))
    for key in ("parallel", "model"):
        table.add_row(key, _in_words(described[key]))
    _print(checkpoint, table)


def _checkpoints(path: Path, with_damaged: bool = False) -> list[Path]:
    """A run's, on request with those that were set aside, oldest first; or the one that a path is.

    Raises ValueError if there is none.
    """
    from pretrain.checkpoint.folder import list_checkpoints, list_damaged, step_of
    from pretrain.checkpoint.index import INDEX_NAME
    from pretrain.choose_checkpoint import no_checkpoint
    from pretrain.run_dir import RunDir

    run = RunDir(path)
    if run.config_path.is_file():
        aside = list_damaged(run.checkpoints) if with_damaged else []
        found = sorted([*list_checkpoints(run.checkpoints), *aside], key=step_of)
    else:
        found = [path] if (path / INDEX_NAME).is_file() else []
    if not found:
        raise no_checkpoint(path)
    return found


def _row(checkpoint: Path, losses: dict[int, float]) -> dict[str, Any]:
    """A line of the list; losses: of the run's validations, by step."""
    from pretrain.checkpoint.folder import list_damaged, step_of
    from pretrain.checkpoint.index import DamagedError, OtherVersionError, read_index

    row: dict[str, Any] = dict.fromkeys(("step", "tokens", "ranks", "size_bytes"))
    row |= {"path": str(checkpoint), "state": COMPLETE, "problem": None}
    try:
        index = read_index(checkpoint)
        tokens = None if index.trainer is None else index.trainer["tokens"]
        row |= {"step": index.step, "tokens": tokens, "ranks": len(index.files), "size_bytes": index.size_bytes}
    except (DamagedError, OtherVersionError, OSError) as error:
        named = checkpoint.name.startswith("step_")
        row |= {"step": step_of(checkpoint) if named else None, "state": DAMAGED, "problem": str(error)}
    if checkpoint in list_damaged(checkpoint.parent):
        row["state"] = ASIDE
    row["validation_loss"] = losses.get(row["step"])
    return row


def _in_words(values: dict[str, Any] | None) -> str:
    """What differs from nothing, as `key value` pairs."""
    return ", ".join(f"{key} {value}" for key, value in (values or {}).items() if value not in (None, False, "none"))


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column)
    return table


def _print(path: Path, table: Any) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(str(path), highlight=False, soft_wrap=True)
    console.print(table)
