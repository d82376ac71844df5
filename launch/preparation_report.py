"""`steppe data prepare --report`: what went into a data folder, what came out of it and why; a table, and a page."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from data_pipeline.curation.decontamination import SetCounts
from data_pipeline.manifest import Manifest
from data_pipeline.preparation.counts import RATIO_WIDTH, Counts, InputCounts, Tally
from data_pipeline.preparation.made_of import REPORT_NAME
from launch.report import page
from launch.report_plots import COLOURS, colours_of, drawing, svg
from pretrain.run_dir import write_durably

PAGE_NAME = "report.html"


@dataclass(frozen=True)
class PreparationReport:
    """The counts of a finished data folder."""

    folder: Path
    manifest: Manifest
    counts: Counts
    evaluation_sets: dict[str, SetCounts]
    """What documents were held against, by name."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises ValueError if the folder is not finished, or was made without counts."""
        manifest, path = Manifest.load(folder), folder / REPORT_NAME
        try:
            tree = json.loads(path.read_bytes())
            sets = {name: SetCounts(**counts) for name, counts in tree["evaluation_sets"].items()}
            return cls(folder, manifest, Counts.from_json(tree["inputs"]), sets)
        except FileNotFoundError:
            raise ValueError(f"data folder {folder} has no {REPORT_NAME}: prepare it again with this Steppe") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): copy it again, or prepare the folder again") from None

    def write(self) -> dict[str, Any]:
        """Write the page into the folder; returns where, and the counts."""
        path = self.folder / PAGE_NAME
        write_durably(path, self.html())
        sets = {name: asdict(counts) for name, counts in self.evaluation_sets.items()}
        return {"report": str(path), "inputs": self.counts.to_json(), "evaluation_sets": sets}

    def show(self) -> dict[str, Any]:
        """Write the page and print the tables; returns where the page is."""
        path = self.write()["report"]
        console = Console()
        for table in (self._inputs_table(), self._rules_table()):
            console.print(table)
        if self.evaluation_sets:
            console.print(self._sets_table())
        return {"report": path}

    def html(self) -> str:
        """The page: it needs nothing but itself."""
        total = self.counts.total
        return page(
            "preparation_report.html.j2",
            title=self.folder.resolve().name,
            manifest=self.manifest,
            inputs=[(name, counts) for name, counts in self.counts.inputs.items()],
            colours=self._colours(),
            total=total,
            rules=self.rules(),
            sets=self.sets(),
            plots=[self._lengths_plot(), self._ratios_plot()],
            median_tokens=median_bin(total.lengths),
        )

    def rules(self) -> list[tuple[str, int, int, float, float]]:
        """(rule, documents, bytes, share of the documents read, share of the bytes read), most bytes first."""
        total = self.counts.total
        documents, text_bytes = max(total.read.documents, 1), max(total.read.text_bytes, 1)
        rows = [
            (rule, tally.documents, tally.text_bytes, tally.documents / documents, tally.text_bytes / text_bytes)
            for rule, tally in total.removed.items()
        ]
        if total.trimmed_bytes:
            rows.append(("c4, within documents", 0, total.trimmed_bytes, 0.0, total.trimmed_bytes / text_bytes))
        return sorted(rows, key=lambda row: (-row[2], row[0]))

    def sets(self) -> list[tuple[str, int, int, int]]:
        """(evaluation set, its texts, those too short to be found, documents that were removed by it)."""
        removed = self.counts.total.removed
        return [
            (name, counts.texts, counts.too_short, removed.get(f"decontaminate.{name}", Tally()).documents)
            for name, counts in self.evaluation_sets.items()
        ]

    def _inputs_table(self) -> Table:
        table = Table(title="inputs", title_justify="left")
        table.add_column("input")
        for name in ("documents", "kept", "MB", "kept", "M tokens", "bytes/token", "broken"):
            table.add_column(name, justify="right")
        for name, counts in self.counts.inputs.items():
            table.add_row(name, *_input_row(counts))
        if len(self.counts.inputs) > 1:
            table.add_row("all", *_input_row(self.counts.total), style="bold")
        return table

    def _rules_table(self) -> Table:
        table = Table(title="removed, by the first rule that did", title_justify="left")
        table.add_column("rule", no_wrap=True)
        for name in ("documents", "share", "MB", "share"):
            table.add_column(name, justify="right")
        for rule, documents, text_bytes, of_documents, of_bytes in self.rules():
            table.add_row(rule, f"{documents:,}", f"{of_documents:.2%}", _millions(text_bytes), f"{of_bytes:.2%}")
        return table

    def _sets_table(self) -> Table:
        table = Table(title="evaluation sets that documents were held against", title_justify="left")
        table.add_column("set")
        for name in ("texts", "too short to be found", "documents removed"):
            table.add_column(name, justify="right")
        for name, *numbers in self.sets():
            table.add_row(name, *(f"{number:,}" for number in numbers))
        return table

    def _colours(self) -> dict[str, str]:
        return colours_of(self.counts.inputs)

    def _lengths_plot(self) -> str:
        total = self.counts.total.lengths
        first, end = _occupied(total)
        with drawing(9.6, 3.0) as (figure, (axes,)):
            self._bars(axes, "lengths", np.arange(first, end))
            axes.set_xticks(np.arange(first, end + 1) - 0.5, [f"{2**edge:,}" for edge in range(first, end + 1)])
            axes.set_xlabel("tokens of a document, with BOS and EOS")
            return svg(figure, "documents by their tokens")

    def _ratios_plot(self) -> str:
        first, end = _occupied(self.counts.total.ratios)
        with drawing(9.6, 3.0) as (figure, (axes,)):
            self._bars(axes, "ratios", np.arange(first, end))
            step = max(1, (end - first) // 12)
            edges = range(first, end + 1, step)
            axes.set_xticks(np.array(edges) - 0.5, [f"{edge * RATIO_WIDTH:g}" for edge in edges])
            axes.set_xlabel("UTF-8 bytes a token, of a document")
            return svg(figure, "documents by their bytes a token")

    def _bars(self, axes: Axes, histogram: str, bins: np.ndarray) -> None:
        """A stack of the inputs in each bin."""
        below = np.zeros(len(bins))
        for name, colour in self._colours().items():
            height = np.array(getattr(self.counts.inputs[name], histogram))[bins]
            axes.bar(bins, height, width=0.92, bottom=below, color=COLOURS[colour], linewidth=0)
            below += height
        axes.set_ylabel("documents")
        axes.grid(False, axis="x")


def median_bin(lengths: list[int]) -> tuple[int, int]:
    """The range [low, high) of tokens in which the median document lies; (0, 0) without documents."""
    if not sum(lengths):
        return (0, 0)
    place = int(np.searchsorted(np.cumsum(lengths), (sum(lengths) + 1) // 2))
    return (2**place, 2 ** (place + 1))


def _occupied(histogram: list[int]) -> tuple[int, int]:
    """The range [first, end) of bins with something in them."""
    occupied = np.flatnonzero(histogram)
    return (int(occupied[0]), int(occupied[-1]) + 1) if len(occupied) else (0, 1)


def _input_row(counts: InputCounts) -> list[str]:
    ratio = f"{counts.kept.text_bytes / counts.tokens:.2f}" if counts.tokens else "-"
    documents = [f"{tally.documents:,}" for tally in (counts.read, counts.kept)]
    millions = [_millions(number) for number in (counts.read.text_bytes, counts.kept.text_bytes, counts.tokens)]
    return [*documents, *millions, ratio, f"{counts.quarantined:,}"]


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f}"
