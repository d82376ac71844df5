"""A run's status as a person reads it on a terminal, and a sweep's as a table."""

import time
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.cluster.status import RunStatus
from pretrain.progress import validation_in_words

COLOURS = {
    **dict.fromkeys(("training", "done"), "green"),
    **dict.fromkeys(("queued", "starting", "stopping"), "yellow"),
    **dict.fromkeys(("failed", "lost"), "red"),
    **dict.fromkeys(("stopped", "cancelled"), "magenta"),
}
# Attempts that a terminal has room for; --json and the report have all.
SHOWN_ATTEMPTS = 8


def run_view(status: RunStatus) -> RenderableType:
    """Everything about one run."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    where = [f"job {status.job_id}"] if status.job_id else []
    where += [f"on {', '.join(status.nodes)}"] if status.nodes else []
    facts.add_row("run", Text(f"{status.name}  {' '.join(where)}".rstrip()))
    facts.add_row("state", _state(status.state, status.why))
    facts.add_row("step", Text(_progress(status)))
    if status.state in ("training", "stopping"):
        facts.add_row("", ProgressBar(total=1.0, completed=_done(status), width=60))
    if status.validation is not None:
        told = validation_in_words(status.validation["by_source"])
        facts.add_row("validation", Text(f"step {status.validation['step']:,}: {told}"))
    if status.checkpoint is not None:
        age = duration(status.checkpoint["age_seconds"])
        facts.add_row("checkpoint", Text(f"step {status.checkpoint['step']:,}, {age} old"))
    if status.goodput is not None:
        facts.add_row("goodput", Text(f"{status.goodput.in_words()}; of {duration(status.goodput.wall_seconds)}"))
    for note in status.notes:
        facts.add_row("note", Text(note, style="yellow"))
    return Group(facts, *([_attempts(status.attempts)] if status.attempts else []))


def sweep_view(sweep: dict[str, Any]) -> RenderableType:
    """A row a point, as `launch.cluster.sweep_status` has them; the best one is marked."""
    points = sweep["points"]
    table = Table()
    table.add_column("point", overflow="fold")
    for key in points[0]["values"]:
        table.add_column(Text(key))
    table.add_column("state", overflow="fold")
    for header in ("step", "loss", "validation loss"):
        table.add_column(header, justify="right")
    for point in points:
        style = "bold green" if point["best"] else ""
        why = "" if point["state"] in ("done", "training") else point["why"]
        table.add_row(
            Text(point["point"] + " *" * point["best"], style=style),
            *(Text(value, style=style) for value in point["values"].values()),
            _state(point["state"], why),
            f"{point['step']:,}",
            *(Text("" if loss is None else f"{loss:.4f}", style) for loss in (point["loss"], point["validation_loss"])),
        )
    notes = [Text(note, style="yellow") for note in sweep["notes"]]
    return Group(table, *notes, Text("* has the lowest loss so far", style="dim"))


def duration(seconds: float) -> str:
    """In the two units that matter: "48 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    minutes = int(seconds // 60)
    if minutes < 1:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def _state(state: str, why: str) -> Text:
    return Text.assemble((state, f"bold {COLOURS[state]}"), f": {why}" if why else "")


def _done(status: RunStatus) -> float:
    """Which part of the run is made."""
    if status.total_steps is not None:
        return min(1.0, status.step / status.total_steps)
    assert status.total_tokens is not None
    return min(1.0, status.tokens / status.total_tokens)


def _progress(status: RunStatus) -> str:
    if status.total_steps is not None:
        parts = [f"{status.step:,} of {status.total_steps:,} ({_done(status):.1%})"]
    else:
        parts = [f"{status.step:,}, {status.tokens:,} of {status.total_tokens:,} tokens ({_done(status):.1%})"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.tokens_per_second is not None and status.state in ("training", "stopping"):
        parts.append(f"{status.tokens_per_second:,.0f} tokens/s")
        parts += [f"MFU {status.mfu:.1%}"] if status.mfu is not None else []
    if status.eta_seconds is not None:
        parts.append(f"about {duration(status.eta_seconds)} left")
    return "  ".join(parts)


def _attempts(rows: list[dict[str, Any]]) -> RenderableType:
    table = Table()
    table.add_column("attempt", justify="right")
    for header in ("began", "job", "nodes", "steps"):
        table.add_column(header)
    table.add_column("ended", overflow="fold", ratio=1)
    first = max(0, len(rows) - SHOWN_ATTEMPTS)
    for number, row in enumerate(rows[first:], start=first + 1):
        job = "" if row["job_id"] is None else row["job_id"]
        more = [
            f"{name} {number}" for name, number in (("task", row["array_task"]), ("restart", row["restart"])) if number
        ]
        again = f" ({', '.join(more)})" if more else ""
        nodes = ", ".join(row["nodes"][:4]) + (f" and {len(row['nodes']) - 4} more" if len(row["nodes"]) > 4 else "")
        steps = f"{row['first_step'] + 1:,} to {row['last_step']:,}" if row["last_step"] > row["first_step"] else "none"
        parts = ["" if row["ended"] == "running" else row["ended"], row["why"]]
        parts += [row["verdict"]] if row["action"] == "stop" and row["ended"] in ("failed", "time limit") else []
        ended = Text(": ".join(part for part in parts if part))
        table.add_row(str(number), _moment(row["begin"]), Text(job + again), Text(nodes), steps, ended)
    return Group(Text(f"the last {len(rows) - first} of {len(rows)} attempts:"), table) if first else table


def _moment(seconds: float) -> str:
    """Local time, as the person's clock has it."""
    return time.strftime("%d %b %H:%M:%S", time.localtime(seconds))
