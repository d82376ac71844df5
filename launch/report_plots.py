"""The plots of a report: SVG to stand inside a page, whose colours follow the page's, light or dark. No torch.

Drawn by matplotlib, which needs neither a network nor a script in the page. Its SVG has fixed colours; each of ours is
replaced by a variable of the page's style sheet.
"""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from launch.curves import BINS, StepCurves, envelope, smoothed, smoothing_window
from launch.goodput import Phase

# Variables of the page's style sheet (launch/report.html.j2), and what each is called while matplotlib draws.
COLOURS = {
    "ink": "#101010",
    "faint": "#b0b0b1",
    "grid": "#e0e0e1",
    "c0": "#2060c1",
    "c1": "#d06012",
    "c2": "#209053",
    "c3": "#a03094",
    "c4": "#b09005",
    "c5": "#1090a6",
    "c6": "#705037",
    "c7": "#d04068",
    "c8": "#607019",
    "c9": "#5050b9",
    "bad": "#c02021",
    "training": "#30a061",
    "queued": "#e0b032",
    "preflight": "#80b0d3",
    "starting": "#4080c4",
    "stopping": "#9070b5",
    "down": "#c03036",
    "stopped": "#c0c0c7",
}
SERIES = tuple(f"c{i}" for i in range(10))
REST = "faint"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "steppe",
    "text.parse_math": False,
    "font.size": 9.0,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.edgecolor": COLOURS["faint"],
    "xtick.color": COLOURS["ink"],
    "ytick.color": COLOURS["ink"],
    "grid.color": COLOURS["grid"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "lines.linewidth": 1.3,
    "path.simplify": True,
}
UNUSED_ID = re.compile(r' id="[a-zA-Z0-9.]+_\d+"')


@dataclass
class Marks:
    """What happened at which step, to be marked in every plot over steps."""

    skipped: list[int] = field(default_factory=list)
    rewinds: list[tuple[int, int]] = field(default_factory=list)  # from, to
    restarts: list[int] = field(default_factory=list)


@contextmanager
def drawing(
    width: float, height: float, columns: int = 1, rows: int = 1, heights: Sequence[float] | None = None
) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """A figure of so many inches and its axes, row by row, in the report's style. heights: of the rows, relative."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).ravel()
        yield figure, list(axes)


def svg(figure: Figure, label: str) -> str:
    """The figure as an element of a page; `label` is for those who cannot see it, as plain text without markup."""
    assert not set('<>&"') & set(label)
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = UNUSED_ID.sub("", body)
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    xlink = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {xlink} {box.group()} role="img" aria-label="{label}">{body}'


def losses(curves: StepCurves, validation: dict[str, tuple[list[int], list[float]]], marks: Marks) -> str:
    """Training loss raw and smoothed, what was taken back, and validation: the whole run, and its later part closer."""
    steps, loss = curves.steps, curves.column("loss")
    held_out = [np.array(pair, dtype=np.float64) for pair in validation.values()]
    with drawing(9.6, 3.4, columns=2) as (figure, (whole, later)):
        for axes in (whole, later):
            for stretch in curves.taken_back:
                _raw(axes, stretch.steps, stretch.column("loss"), "bad", 0.5, bins=100)
            _raw(axes, steps, loss, "faint", 1.0)
            _line(axes, steps, smoothed(loss, smoothing_window(len(loss))), "c0")
            for (at, values), colour in zip(held_out, _cycle("c1"), strict=False):
                drawn = envelope(at, values)
                marker = "o" if len(at) <= 60 else ""
                axes.plot(drawn.x, drawn.mean, color=COLOURS[colour], marker=marker, markersize=3, linewidth=1)
            _over_steps(axes, "nats a token")
        whole.set_title("the whole run")
        later.set_title("the last four fifths, closer")
        _closer(later, np.concatenate([np.stack([steps, loss]), *held_out], axis=1))
        for axes in (whole, later):
            _mark(axes, marks)
        return svg(figure, "training and validation loss over steps")


def over_steps(
    curves: StepCurves, columns: Sequence[tuple[str, str, str]], marks: Marks, log: tuple[str, ...] = ()
) -> str:
    """Small plots side by side: (column, title, unit) of each; those in `log` on a logarithmic scale."""
    with drawing(9.6, 2.6, columns=len(columns)) as (figure, every):
        for axes, (name, title, unit) in zip(every, columns, strict=True):
            values = curves.column(name)
            if name == "lr":
                _line(axes, curves.steps, values, "c0")
            else:
                _raw(axes, curves.steps, values, "faint", 1.0)
                _line(axes, curves.steps, smoothed(values, smoothing_window(len(values))), "c0")
            _over_steps(axes, unit)
            axes.set_title(title)
            if name in log and np.nanmin(values, initial=np.inf, where=np.isfinite(values)) > 0:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
            if name == "mfu":
                axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
            elif name == "tokens_per_second":
                axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
            if name != "lr":
                _mark(axes, marks)
        return svg(figure, " and ".join(title for _, title, _ in columns) + " over steps")


def timeline(phases: Sequence[Phase], times: np.ndarray, made: np.ndarray) -> str:
    """The run over wall time: its phases as a band, and above it the step that was made, (n,), at times (n,)."""
    begin, end = phases[0].begin, phases[-1].end
    unit, name = _time_unit(end - begin)
    with drawing(9.6, 2.4, rows=2, heights=(9, 1)) as (figure, (above, band)):
        falls = np.flatnonzero(np.diff(made) <= 0) + 1  # between two attempts there is no line
        when, step = np.insert((times - begin) / unit, falls, np.nan), np.insert(made.astype(float), falls, np.nan)
        above.plot(when, step, color=COLOURS["c0"], linewidth=1)
        above.set_ylabel("step")
        above.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        above.yaxis.set_major_formatter(EngFormatter(sep=""))
        for kind in dict.fromkeys(phase.kind for phase in phases):
            spans = [((p.begin - begin) / unit, (p.end - p.begin) / unit) for p in phases if p.kind == kind]
            band.broken_barh(spans, (0, 1), facecolors=COLOURS[kind], linewidth=0)
        band.set_yticks([])
        band.grid(False)
        band.set_xlabel(f"{name} since the run began")
        above.tick_params(labelbottom=False)
        for axes in (above, band):
            axes.set_xlim(0, max((end - begin) / unit, 1e-9))
        return svg(figure, "steps and phases over wall time")


def overlaid(curves: dict[str, StepCurves]) -> str:
    """The smoothed losses of several runs, in the order of SERIES' colours."""
    with drawing(9.6, 3.6, columns=2) as (figure, every):
        for axes in every:
            for one, colour in zip(curves.values(), _cycle("c0"), strict=False):
                loss = one.column("loss")
                _line(axes, one.steps, smoothed(loss, smoothing_window(len(loss))), colour)
            _over_steps(axes, "nats a token")
        every[0].set_title("the whole run")
        every[1].set_title("the last four fifths, closer")
        _closer(
            every[1], np.concatenate([np.stack([one.steps, one.column("loss")]) for one in curves.values()], axis=1)
        )
        return svg(figure, "smoothed training losses over steps")


def expert_load(pairs: dict[str, list[int]]) -> str:
    """Token-expert pairs of each expert (across) in each layer (down), over the mean of the layer."""
    load = np.array([np.array(row) / max(1e-9, np.mean(row)) for row in pairs.values()])
    with drawing(9.6, 0.9 + min(4.0, 0.16 * len(load))) as (figure, (axes,)):
        image = axes.imshow(load, aspect="auto", vmin=0, vmax=max(2.0, load.max()), interpolation="nearest")
        axes.grid(False)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        axes.set_yticks(range(len(pairs)), list(pairs)) if len(pairs) <= 24 else None
        figure.colorbar(image, ax=axes, label="load over mean")
        return svg(figure, "load of each expert in each layer")


def colour_of(index: int, first: str = "c0") -> str:
    """The variable of the page's style sheet that the index-th curve has."""
    return SERIES[(SERIES.index(first) + index) % len(SERIES)]


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """The colour of each of some series that a plot tells apart; after the first ten they share one."""
    return {name: colour_of(i) if i < len(SERIES) else REST for i, name in enumerate(names)}


def _cycle(first: str) -> Iterator[str]:
    index = 0
    while True:
        yield colour_of(index, first)
        index += 1


def _raw(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, alpha: float, bins: int = BINS) -> None:
    """Every value; of more than `bins`, the band that they lie in."""
    drawn = envelope(steps, values, bins)
    if drawn.exact:
        axes.plot(drawn.x, drawn.mean, color=COLOURS[colour], linewidth=0.8, alpha=alpha)
    else:
        axes.fill_between(drawn.x, drawn.low, drawn.high, color=COLOURS[colour], linewidth=0, alpha=alpha)


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    drawn = envelope(steps, values)
    axes.plot(drawn.x, drawn.mean, color=COLOURS[colour])


def _over_steps(axes: Axes, unit: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _closer(axes: Axes, points: np.ndarray) -> None:
    """The last four fifths of the steps, and the ordinates between which nearly all values there lie: a spike may leave
    the plot. points: (2, n), steps and values."""
    steps, values = points[:, np.isfinite(points[1])]
    if not len(steps):
        return
    start = steps.min() + (steps.max() - steps.min()) / 5
    low, high = np.quantile(values[steps >= start], [0.001, 0.999])
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_xlim(start, max(steps.max(), start + 1))
    axes.set_ylim(low - margin, high + margin)


def _mark(axes: Axes, marks: Marks) -> None:
    """Rewinds as bands, restarts as ticks below, skipped steps as triangles above."""
    left, right = axes.get_xlim()
    for back_from, back_to in marks.rewinds:
        axes.axvspan(back_to, back_from, color=COLOURS["bad"], alpha=0.18, linewidth=0)
    for marked, height, sign in ((marks.restarts, 0.0, "|"), (marks.skipped, 0.97, "v")):
        width = max(1.0, (right - left) / 400)  # marks that would cover each other are one
        at = np.unique(np.round(np.array(marked) / width) * width)
        at = at[(at >= left) & (at <= right)]
        if len(at):
            where, heights = axes.get_xaxis_transform(), np.full(len(at), height)
            axes.plot(at, heights, sign, color=COLOURS["bad"], markersize=5, transform=where, clip_on=False)
    axes.set_xlim(left, right)


def _time_unit(seconds: float) -> tuple[float, str]:
    """In which unit a time axis of this length reads well."""
    for unit, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 3 * unit:
            return unit, name
    return 1.0, "seconds"
