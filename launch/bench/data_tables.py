"""What the parts of `steppe bench data` have in common: who can take part, whether a target is met, tables."""

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from launch.bench.turns import Spread

NOT_INSTALLED = "not installed here: pip install {}"


def say(text: str) -> None:
    """Tell on stderr what is being done."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def without_missing(packages: dict[str, tuple[str, ...]]) -> tuple[list[str], dict[str, str]]:
    """Part peers, each with the packages that it needs, into those that can run here, and why the others cannot."""
    left_out = {}
    for name, needed in packages.items():
        missing = [package for package in needed if importlib.util.find_spec(package) is None]
        if missing:
            left_out[name] = NOT_INSTALLED.format(" ".join(missing))
    return [name for name in packages if name not in left_out], left_out


def at_least(what: str, bound: float, spread: Spread) -> dict[str, Any]:
    """A target, and whether the median meets it."""
    return {"what": what, "at least": bound, **spread.as_dict(), "met": spread.median >= bound}


def below(what: str, bound: float, spread: Spread) -> dict[str, Any]:
    """A target, and whether the median meets it."""
    return {"what": what, "below": bound, **spread.as_dict(), "met": spread.median < bound}


def in_words(spread: dict[str, float], digits: int) -> str:
    """Median and extremes."""
    return f"{spread['median']:,.{digits}f} ({spread['min']:,.{digits}f}-{spread['max']:,.{digits}f})"


def print_part(
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    about: dict[str, str],
    note: str,
    result: dict[str, Any],
) -> None:
    """A table of one part, what its lines are, what was left out, and whether its targets are met."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(headers[0], no_wrap=True)
    for header in headers[1:]:
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    lines = [f"{name}: {what}" for name, what in about.items()]
    lines += [f"{name} is left out: {why}" for name, why in result.get("left_out", {}).items()]
    lines.append(note)
    for verdict in result["targets"]:
        bound = next(f"{word} {verdict[word]:g}" for word in ("below", "at least") if word in verdict)
        met = "met" if verdict["met"] else "MISSED"
        lines.append(f"{met}: {verdict['what']} is {in_words(verdict, 3)}, to be {bound}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    console.print()
