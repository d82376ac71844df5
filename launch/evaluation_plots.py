"""What an evaluation's page draws: loss by context, and documents by their bits per byte. No torch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.evaluation_words import context
from launch.report_plots import COLOURS, drawing, svg

BIN_WIDTH = 0.01  # bits per byte
BINS = 2400
MOST_BARS = 60
TAIL = 0.001
"""Of the documents so many may lie below the first bar, and above the last: those two hold them, too."""


class Histogram:
    """Documents by their bits per byte, of each domain; memory does not grow with their number."""

    def __init__(self, domains: Sequence[str]) -> None:
        self.counts = {name: np.zeros(BINS, dtype=np.int64) for name in domains}

    def add(self, domain: str, bits_per_byte: float) -> None:
        self.counts[domain][min(int(bits_per_byte / BIN_WIDTH), BINS - 1)] += 1

    @property
    def documents(self) -> int:
        return int(sum(counts.sum() for counts in self.counts.values()))

    def bars(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """At most MOST_BARS bars of one width: their edges (n + 1,), and of each domain its documents in them (n,)."""
        so_far = np.cumsum(sum(self.counts.values()))
        first, last = np.searchsorted(so_far, [max(1, TAIL * so_far[-1]), math.ceil((1 - TAIL) * so_far[-1])])
        width = -(-int(last + 1 - first) // MOST_BARS)
        edges = np.arange(first, last + 1 + width, width)
        inner = edges[1:-1]
        heights = {name: np.add.reduceat(counts, [0, *inner]) for name, counts in self.counts.items()}
        return edges * BIN_WIDTH, heights


def documents_plot(histogram: Histogram, colours: Mapping[str, str]) -> str:
    """A stack in each bar of the domains, those of one colour together."""
    edges, heights = histogram.bars()
    with drawing(9.6, 3.0) as (figure, (axes,)):
        below = np.zeros(len(edges) - 1)
        for colour in dict.fromkeys(colours.values()):
            height = np.sum([heights[name] for name in heights if colours[name] == colour], axis=0)
            widths = np.diff(edges) * 0.94
            axes.bar(edges[:-1], height, widths, below, align="edge", color=COLOURS[colour], linewidth=0)
            below += height
        axes.set_xlabel("bits per byte of a document")
        axes.set_ylabel("documents")
        axes.grid(False, axis="x")
        return svg(figure, "documents by their bits per byte")


def positions_plot(buckets: Sequence[Mapping[str, Any]]) -> str:
    """The loss of targets over how much context they had."""
    at = np.arange(len(buckets))
    with drawing(9.6, 3.0) as (figure, (axes,)):
        axes.plot(at, [bucket["loss"] for bucket in buckets], color=COLOURS["c0"], marker="o", markersize=4)
        axes.set_xticks(at, [context(bucket) for bucket in buckets], rotation=30 if len(buckets) > 8 else 0)
        axes.set_xlabel("tokens of its document that the model sees before a target")
        axes.set_ylabel("nats a token")
        return svg(figure, "loss by the context that a target had")
