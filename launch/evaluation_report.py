"""`steppe eval --html`: one page about an evaluation, that opens without a network and tells no document's text."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.evaluation_plots import Histogram, documents_plot, positions_plot
from launch.evaluation_words import (
    INTERVAL,
    computed,
    cost,
    differences_of,
    number,
    scores_of,
    span,
    task_rows,
    title,
    verdict,
)
from launch.report import page
from launch.report_plots import REST, colours_of
from pretrain.evaluation.record import DocumentScore
from pretrain.evaluation.score import Score

LISTED = 10
LISTED_BYTES = 256
"""Shorter documents are in neither list of extremes: they would be all that is to be seen there."""


@dataclass(frozen=True, order=True)
class Listed:
    """A document as the lists of extremes show it."""

    bits_per_byte: float
    index: int
    domain: str = field(compare=False)
    bytes: int = field(compare=False)
    loss: float = field(compare=False)


class Documents:
    """What a page keeps of the documents' scores, which are read once and in any order."""

    def __init__(self, domains: Iterable[str], scores: Iterable[DocumentScore]) -> None:
        self.histogram = Histogram(list(domains))
        self._hardest: list[tuple[float, Listed]] = []
        self._easiest: list[tuple[float, Listed]] = []
        for score in scores:
            if score.bytes and score.tokens:
                self._hear(score)

    @property
    def hardest(self) -> list[Listed]:
        return [listed for _, listed in sorted(self._hardest, reverse=True)]

    @property
    def easiest(self) -> list[Listed]:
        return [listed for _, listed in sorted(self._easiest, reverse=True)]

    def _hear(self, score: DocumentScore) -> None:
        sums = Score(score.nats, score.tokens, score.bytes, score.words, 1)
        self.histogram.add(score.domain, sums.bits_per_byte)
        if score.bytes < LISTED_BYTES:
            return
        listed = Listed(sums.bits_per_byte, score.index, score.domain, score.bytes, sums.loss)
        for heap, key in ((self._hardest, sums.bits_per_byte), (self._easiest, -sums.bits_per_byte)):
            if len(heap) < LISTED:
                heapq.heappush(heap, (key, listed))
            else:
                heapq.heappushpop(heap, (key, listed))


@dataclass(frozen=True)
class Strip:
    """A number with its interval as a strip of a table draws them: places from 0 to 100. zero: where 0 is."""

    colour: str
    zero: float
    at: float
    low: float
    high: float


def evaluation_page(result: Mapping[str, Any], scores: Iterable[DocumentScore]) -> str:
    """The page about what `steppe eval --json` prints, and about the scores of its documents in any order."""
    return page(
        "evaluation.html.j2",
        title=title(result),
        facts=_facts(result),
        texts=_texts(result, scores) if "by_domain" in result else None,
        tasks=[] if result["tasks"] is None else list(task_rows(result["tasks"])),
        conventions=result["conventions"],
        interval=INTERVAL,
        number=number,
        span=span,
    )


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The first lines of the page: name and value."""
    facts = [("computed in", computed(result))]
    if "by_domain" in result:
        stride = "" if result["stride"] is None else f", stride {result['stride']}"
        facts.append(("window", f"{result['window']}{stride}"))
        counts = (f"{result[name]:,} {name}" for name in ("documents", "words", "bytes", "tokens"))
        facts.append(("texts", ", ".join(counts)))
    facts.append(("took", cost(result)))
    return facts + [("passed over", reason) for reason in result["passed_over"]]


def _texts(result: Mapping[str, Any], scores: Iterable[DocumentScore]) -> dict[str, Any]:
    """What the page tells of documents: tables with their strips, and plots as SVG."""
    documents = Documents(result["by_domain"], scores)
    rows, colours = scores_of(result), colours_of(result["by_domain"])
    spread = {name: score["interval"] and score["interval"]["bits_per_byte"] for name, score in rows.items()}
    values = {name: score["bits_per_byte"] for name, score in rows.items()}
    return {
        "rows": rows,
        "colours": colours,
        "legend": {colour: name if colour != REST else "others" for name, colour in colours.items()},
        "strips": _strips(values, spread, {name: colours.get(name, "soft") for name in rows}),
        "compared": result["compared"],
        "differences": _differences(result["compared"]) if result["compared"] else {},
        "positions": positions_plot(result["by_position"]) if len(result["by_position"]) > 1 else "",
        "histogram": documents_plot(documents.histogram, colours) if documents.histogram.documents > 1 else "",
        "extremes": {"hardest": documents.hardest, "easiest": documents.easiest} if documents.hardest else {},
        "listed_bytes": LISTED_BYTES,
    }


def _differences(compared: Mapping[str, Any]) -> dict[str, list[tuple[str, Mapping[str, Any], str, Strip]]]:
    """By measure: domain, difference, what it says, and its strip."""
    tables = {}
    for measure in compared["measures"]:
        rows = differences_of(compared, measure)
        said = {name: verdict(row) for name, row in rows.items()}
        strips = _strips(
            {name: row["difference"] for name, row in rows.items()},
            {name: row["interval"] for name, row in rows.items()},
            {name: {"better": "c2", "worse": "bad"}.get(words, "soft") for name, words in said.items()},
        )
        tables[measure.replace("_", " ")] = [(name, row, said[name], strips[name]) for name, row in rows.items()]
    return tables


def _strips(
    values: Mapping[str, float], intervals: Mapping[str, Sequence[float] | None], colours: Mapping[str, str]
) -> dict[str, Strip]:
    """Strips of one scale, which holds 0 and every interval."""
    spans = {name: (value, *(intervals[name] or (value, value))) for name, value in values.items()}
    every = [0.0, *(number for span in spans.values() for number in span)]
    least, most = min(every), max(every)
    scale = 100 / ((most - least) or 1.0)

    def place(value: float) -> float:
        return round((value - least) * scale, 2)

    return {name: Strip(colours[name], place(0.0), *map(place, span)) for name, span in spans.items()}
