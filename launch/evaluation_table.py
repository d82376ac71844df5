"""The result of an evaluation at a terminal: tables of which nothing is ever cut, then what their numbers mean.

A result is the object that `steppe eval --json` prints.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from launch.evaluation_words import (
    INTERVAL,
    computed,
    context,
    cost,
    differences_of,
    number,
    scores_of,
    span,
    task_rows,
    title,
    verdict,
)

Score = Mapping[str, Any]
Column = tuple[str, Callable[[Score], str]]
"""A heading, and what stands below it for a score."""

BAR_WIDTH = 32
NAME_WIDTH = 20
"""Of a longer name a line holds so much, where that lets all columns stand side by side."""
UNBOUNDED = 10_000
MEASURES: tuple[Column, ...] = (
    ("bits per\nbyte", lambda score: f"{score['bits_per_byte']:.4f}"),
    (INTERVAL, lambda score: span(score["interval"] and score["interval"]["bits_per_byte"])),
    ("perplexity\nper token", lambda score: number(score["perplexity"])),
    ("\nper word", lambda score: number(score["word_perplexity"])),
    ("\nper byte", lambda score: number(score["byte_perplexity"])),
)
COUNTS: tuple[Column, ...] = (
    ("documents", lambda score: f"{score['documents']:,}"),
    ("tokens", lambda score: f"{score['tokens']:,}"),
    ("words", lambda score: f"{score['words']:,}"),
    ("bytes", lambda score: f"{score['bytes']:,}"),
)


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print all of a result: of texts, of tasks, or of both."""
    console.print(Text(title(result), style="bold"))
    if "by_domain" in result:
        _show_texts(result, console)
    if result["tasks"] is not None:
        console.print(_tasks_table(result["tasks"]))
    for convention in result["conventions"]:
        point = Table.grid(padding=(0, 1))
        point.add_row("-", Text(convention))
        console.print(point)
    console.print(Text(f"computed in {computed(result)}: {cost(result)}", style="dim"))


def _show_texts(result: Mapping[str, Any], console: Console) -> None:
    rows = scores_of(result)
    whole = _scores_table(rows, (*MEASURES, *COUNTS))
    longest = max(cell_len(name) for name in rows)
    needed = Measurement.get(console, console.options.update(max_width=UNBOUNDED), whole).maximum
    fits = needed - longest + min(longest, NAME_WIDTH) <= console.width
    for table in (whole,) if fits else (_scores_table(rows, MEASURES), _scores_table(rows, COUNTS)):
        console.print(table)
    if result["compared"] is not None:
        for table in _comparison_tables(result["compared"]):
            console.print(table)
    if len(result["by_position"]) > 1:
        console.print(_positions_table(result["by_position"], "#" if console.options.ascii_only else "\u2588"))


def _scores_table(rows: Mapping[str, Score], columns: Sequence[Column]) -> Table:
    table = _table("domain", *(heading for heading, _ in columns))
    for name, score in rows.items():
        table.add_row(Text(name), *(tell(score) for _, tell in columns))
    return table


def _comparison_tables(compared: Mapping[str, Any]) -> list[Table]:
    """A table a measure: the differences of each domain, and what they say."""
    tables = []
    for measure in compared["measures"]:
        table = _table("domain", "difference", INTERVAL, "this model is")
        table.title = Text(f"{measure.replace('_', ' ')}, minus that of {compared['with']} (less is better)")
        for name, found in differences_of(compared, measure).items():
            table.add_row(Text(name), f"{found['difference']:+.4f}", span(found["interval"], "+"), verdict(found))
        tables.append(table)
    return tables


def _positions_table(buckets: Sequence[Mapping[str, Any]], block: str) -> Table:
    table = _table("tokens of context", "targets", "loss", "")
    table.columns[-1].justify = "left"
    worst = max(bucket["loss"] for bucket in buckets)
    for bucket in buckets:
        bar = block * round(BAR_WIDTH * bucket["loss"] / worst) if worst > 0 else ""
        table.add_row(context(bucket), f"{bucket['tokens']:,}", f"{bucket['loss']:.4f}", bar)
    return table


def _tasks_table(tasks: Mapping[str, Any]) -> Table:
    table = _table("task", "metric", "value", "standard\nerror", "shots", "version")
    for task, metric, *numbers in task_rows(tasks):
        table.add_row(Text(task), Text(metric), *numbers)
    return table


def _table(name: str, *headings: str) -> Table:
    """A table whose first column gives way where a terminal is narrow: it goes on in the next line."""
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", title_style="")
    table.add_column(name, overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
