"""`steppe report`: one page about a run, or about the runs of a sweep, that opens without a network. No torch."""

import os
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launch import report_plots as plots
from launch.cluster.status import RunStatus, WatchedRun, in_words
from launch.cluster.sweep_status import WatchedSweep
from launch.curves import StepCurves, smoothing_window
from launch.goodput import ACCOUNTS, Phase
from launch.status_view import duration
from pretrain.profile_table import mfu_in_words, region_rows
from pretrain.progress import validation_in_words
from pretrain.run_dir import RunDir, read_json

TEMPLATES = Path(__file__).parent
# Rows of a table that are shown; of more, the last ones.
MOST_ROWS = 200
# Points of the curve of steps over wall time.
TIMELINE_POINTS = 4000
WARNINGS = ("rewind", "left_out", "checkpoint_failed", "replicas_differ", "straggler", "disk_low")


@dataclass
class Told:
    """What a report keeps of a run's events, which are read once."""

    curves: StepCurves = field(default_factory=StepCurves)
    marks: plots.Marks = field(default_factory=plots.Marks)
    validation: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    expert_load: dict[str, Any] | None = None
    times: array = field(default_factory=lambda: array("d"))  # of every step that was made, and which it was
    made: array = field(default_factory=lambda: array("q"))

    def hear(self, event: dict[str, Any]) -> None:
        """Take in the next event."""
        match event["type"]:
            case "step":
                self.curves.add(event)
                self.times.append(event["time"])
                self.made.append(event["step"])
                if event["skipped"]:
                    self.marks.skipped.append(event["step"])
            case "start":
                self._back_to(event["step"])
                if event["step"]:
                    self.marks.restarts.append(event["step"])
            case "rewind":
                self._back_to(event["to_step"])
                self.marks.rewinds.append((event["step"], event["to_step"]))
            case "evaluation":
                for source, measures in event["by_source"].items():
                    steps, losses = self.validation.setdefault(source, ([], []))
                    steps.append(event["step"])
                    losses.append(measures["loss"])
            case "stage":
                self.stages.append(event)
            case "checkpoint":
                self.checkpoints.append(event)
            case "resume":
                self.changes.append(event)
            case "expert_load":
                self.expert_load = event
        if event["type"] in WARNINGS:
            self.warnings.append(event)

    def _back_to(self, step: int) -> None:
        """What came after this step is no part of the run any more."""
        self.curves.take_back(step)
        for steps, losses in self.validation.values():
            while steps and steps[-1] > step:
                steps.pop()
                losses.pop()
        for kept in (self.stages, self.checkpoints):
            kept[:] = [event for event in kept if event["step"] <= step]
        self.marks.skipped[:] = [skipped for skipped in self.marks.skipped if skipped <= step]


def run_report(path: Path) -> str:
    """The page about one run. Raises ValueError if the folder is none."""
    told = Told()
    watched = WatchedRun(path, listener=told.hear)
    status = watched.look()
    environment = watched.run.environment_path
    return page(
        "report.html.j2",
        title=status.name,
        status=status,
        facts=_facts(status),
        goodput=_goodput(status),
        profile=_profile(watched.run),
        plots=_plots(told, watched.history.phases),
        window=smoothing_window(len(told.curves)),
        validation=[(name, plots.colour_of(i, "c1")) for i, name in enumerate(told.validation)],
        phases=list(dict.fromkeys(phase.kind for phase in watched.history.phases)),
        attempts=_last(status.attempts),
        stages=[_stage(event) for event in told.stages],
        checkpoints=_last([_checkpoint(event) for event in told.checkpoints]),
        warnings=_last([{"time": event["time"], "words": _warning(event)} for event in told.warnings]),
        changes=[(event["time"], key, *pair) for event in told.changes for key, pair in event["changes"].items()],
        config=watched.run.config_path.read_text(encoding="utf-8"),
        environment=yaml.safe_dump(read_json(environment), sort_keys=False) if environment.is_file() else "",
    )


def sweep_report(folder: Path) -> str:
    """The page about the runs of a sweep, compared. Raises ValueError if the folder is none."""
    sweep = WatchedSweep(folder)
    curves = {point.name: StepCurves() for point in sweep.sweep.points}
    for point, watched in zip(sweep.sweep.points, sweep.points, strict=True):
        watched.listener = _curves_only(curves[point.name])
    rows = sweep.rows(sweep.look())
    some = {name: one for name, one in curves.items() if len(one)}
    return page(
        "report_sweep.html.j2",
        title=folder.resolve().name,
        folder=str(folder),
        rows=rows,
        colours={name: plots.colour_of(i) for i, name in enumerate(some)},
        losses=plots.overlaid(some) if some else "",
    )


def _curves_only(curves: StepCurves) -> Callable[[dict[str, Any]], None]:
    def hear(event: dict[str, Any]) -> None:
        if event["type"] == "step":
            curves.add(event)
        elif event["type"] in ("start", "rewind"):
            curves.take_back(event["step" if event["type"] == "start" else "to_step"])

    return hear


def _plots(told: Told, phases: list[Phase]) -> dict[str, str]:
    """SVG by name; none of what has nothing to show."""
    curves, marks = told.curves, told.marks
    drawn: dict[str, str] = {}
    if len(curves):
        pair, speed = ("grad_norm", "gradient norm", ""), ("tokens_per_second", "throughput", "tokens/s")
        drawn["loss"] = plots.losses(curves, told.validation, marks)
        drawn["optimizer"] = plots.over_steps(curves, (pair, ("lr", "learning rate", "")), marks, log=("grad_norm",))
        drawn["speed"] = plots.over_steps(curves, (speed, ("mfu", "model FLOPs utilisation", "")), marks)
        stride = max(1, len(told.times) // TIMELINE_POINTS)
        times, made = np.array(told.times)[::stride], np.array(told.made)[::stride]
        drawn["timeline"] = plots.timeline(phases, times, made)
    if told.expert_load is not None:
        imbalance = ("expert_imbalance", "busiest expert over the mean, mean of layers", "")
        drawn["balance"] = plots.over_steps(curves, (imbalance,), marks)
        drawn["experts"] = plots.expert_load(told.expert_load["pairs"])
    return drawn


def _facts(status: RunStatus) -> list[tuple[str, str]]:
    """The first lines of a report: name and value."""
    of = f" of {status.total_steps:,}" if status.total_steps else ""
    facts = [("state", status.state + (f": {status.why}" if status.why else "")), ("step", f"{status.step:,}{of}")]
    facts += [("tokens", f"{status.tokens:,}" + (f" of {status.total_tokens:,}" if status.total_tokens else ""))]
    if status.loss is not None:
        facts.append(("loss", f"{status.loss:.4f} nats a token"))
    if status.validation is not None:
        told = validation_in_words(status.validation["by_source"])
        facts.append((f"validation at step {status.validation['step']:,}", told))
    if status.goodput is not None:
        facts.append(("goodput", f"{status.goodput.in_words()}; of {duration(status.goodput.wall_seconds)}"))
    return facts + [("note", note) for note in status.notes]


def _profile(run: RunDir) -> dict[str, Any] | None:
    """The last profile of the run, if there is one."""
    written = sorted(run.profiles.glob("step_*/regions.json"), key=lambda path: path.stat().st_mtime_ns)
    if not written:
        return None
    facts = read_json(written[-1])
    first, last = facts["steps"][0]["step"], facts["steps"][-1]["step"]
    rows = region_rows(facts)
    on_device = any(row.device_seconds for row in rows)
    return {"first": first, "last": last, "rows": rows, "on_device": on_device, "mfu": mfu_in_words(facts)}


def _goodput(status: RunStatus) -> list[dict[str, Any]]:
    """The accounts that have any time, in their order."""
    found = status.goodput
    if found is None:
        return []
    return [
        {"name": name, "words": words, "seconds": found.seconds[name], "share": found.share(name)}
        for name, words in ACCOUNTS.items()
        if found.seconds[name] > 0
    ]


def _stage(event: dict[str, Any]) -> dict[str, Any]:
    """A stage, its mixture as shares of 1 with the colours of its sources."""
    total = sum(event["weights"].values())
    shares = [(name, weight / total, plots.colour_of(i)) for i, (name, weight) in enumerate(event["weights"].items())]
    return {**event, "shares": shares}


def _checkpoint(event: dict[str, Any]) -> dict[str, Any]:
    return {**event, "there": os.path.isdir(event["path"])}


def _warning(event: dict[str, Any]) -> str:
    if event["type"] == "left_out":
        ranges = ", ".join(f"{start:,} to {end - 1:,}" for start, end in event["ranges"])
        return f"step {event['step']}: samples {ranges} are left out from here on, as the config says"
    if event["type"] == "rewind":
        start, end = event["left_out"]
        spike = f"step {event['step']}: a spike (z-score {event['zscore']:.1f})"
        return f"{spike}; went back to step {event['to_step']}, and samples {start:,} to {end - 1:,} are left out"
    return in_words(event)


@dataclass(frozen=True)
class Rows:
    """Of a long table the last rows, and how many there are in all."""

    shown: list[Any]
    total: int


def _last(rows: list[Any]) -> Rows:
    return Rows(rows[-MOST_ROWS:], len(rows))


def page(template: str, **values: Any) -> str:
    """A template of this folder, filled in."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "moment": _moment}
    return environment.get_template(template).render(values)


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
