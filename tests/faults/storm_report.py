"""What a kill storm reports: kill by kill while it goes on, and a table in the end."""

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.table import Table

from pretrain.progress import counting_bar
from tests.faults.storm_curves import Comparison, Gap
from tests.faults.storm_plan import Model


@dataclass(frozen=True)
class Struck:
    """What came of one kill.

    resumed_after: the step whose checkpoint the attempt loaded, None if it died before.
    last_step: the last that it made, None if none. newest: of the checkpoints that it left, 0 if there is none.
    lost: steps that the run has made and must make again. during_save: a save was under way.
    """

    setup: str
    victim: str
    resumed_after: int | None
    last_step: int | None
    newest: int
    lost: int
    during_save: bool
    seconds: float

    @property
    def moment(self) -> str:
        if self.resumed_after is None:
            return "before it had loaded"
        if self.during_save:
            return "during a save"
        return "before its first step" if self.last_step is None else "between saves"


@dataclass
class Report:
    """All that a storm has found.

    curves: by run, what each step of it (from 1 on) was. failure: what went wrong before there were any.
    """

    model: Model
    seed: int
    kills: int
    folder: Path
    struck: list[Struck] = field(default_factory=list)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    comparison: Comparison | None = None
    failure: str | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.failure is None and self.comparison is not None and self.comparison.ok

    @property
    def repeat(self) -> str:
        """The command that does the same again."""
        words = ["--kills", str(self.kills), "--seed", str(self.seed), "--model", self.model]
        return shlex.join(["python", "-m", "tests.faults.kill_storm", *words])

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"ok": self.ok, "repeat": self.repeat, **asdict(self), "folder": str(self.folder)}


class StormProgress:
    """A live bar on a terminal, a line for each kill elsewhere. On stderr."""

    def __init__(self, kills: int, console: Console | None = None) -> None:
        self.kills = kills
        self.console = console or Console(stderr=True, highlight=False)
        self.bar = counting_bar("kills", self.console)
        self.task = self.bar.add_task("kills", total=kills, figures="preparing")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()

    def struck(self, struck: Sequence[Struck]) -> None:
        """After each kill."""
        last = struck[-1]
        victims = Counter(_kind(one.victim) for one in struck)
        tally = ", ".join(f"{count} {victim}" for victim, count in sorted(victims.items()))
        saves = sum(one.during_save for one in struck)
        self.bar.update(self.task, completed=len(struck), figures=f"step {last.newest}; {tally}; {saves} during a save")
        if not self.console.is_terminal:
            made = "no step" if last.last_step is None else f"made step {last.last_step}"
            resumed = "" if last.resumed_after is None else f"resumed after step {last.resumed_after}, {made}; "
            line = f"kill {len(struck)}/{self.kills}  {last.setup}: {resumed}{last.victim} killed {last.moment}"
            self.console.print(f"{line}; {last.seconds:.0f} s", markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """What goes on after the kills."""
        self.bar.update(self.task, figures=text)
        if not self.console.is_terminal:
            self.console.print(text, markup=False, soft_wrap=True)


def print_report(report: Report) -> None:
    """Tables on stdout."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if report.struck:
        console.print(_kills_table(report))
    if report.comparison is not None:
        console.print(_curves_table(report.comparison))
        for problem in report.comparison.problems:
            console.print(problem, markup=False, soft_wrap=True)
    if report.failure:
        console.print(report.failure, markup=False, soft_wrap=True)
    verdict = "is the undisturbed run, but for rounding" if report.ok else "FAILED"
    console.print(f"{len(report.struck)} kills in {report.seconds / 60:.1f} min: the run {verdict}.", soft_wrap=True)


def _kind(victim: str) -> str:
    return "one rank" if victim.startswith("rank ") else victim


def _kills_table(report: Report) -> Table:
    struck = report.struck
    table = Table(title=f"Kill storm, {report.model} model, seed {report.seed}", title_justify="left")
    table.add_column("killed")
    moments = sorted({one.moment for one in struck})
    for moment in moments:
        table.add_column(moment, justify="right")
    table.add_column("in all", justify="right")
    table.add_column("steps lost, at most", justify="right")
    for victim in sorted({_kind(one.victim) for one in struck}):
        group = [one for one in struck if _kind(one.victim) == victim]
        counts = [str(sum(one.moment == moment for one in group)) for moment in moments]
        table.add_row(victim, *counts, str(len(group)), str(max(one.lost for one in group)))
    return table


def _curves_table(comparison: Comparison) -> Table:
    table = Table(title=f"{comparison.steps} steps, largest differences", title_justify="left")
    for column in ("", "|A - B| undisturbed", "|storm - A|", "at step", "allowed", ""):
        table.add_column(column, justify="right")
    rows: dict[str, Gap | None] = {"loss": comparison.loss, "grad_norm, relative": comparison.grad_norm}
    for name, gap in rows.items():
        if gap is not None:
            verdict = "[green]ok[/]" if gap.ok else "[red]failed[/]"
            figures = (f"{gap.undisturbed:.1e}", f"{gap.storm:.1e}", str(gap.at_step), f"{gap.allowed:.1e}")
            table.add_row(name, *figures, verdict)
    return table
