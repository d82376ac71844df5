"""The preflight: what every rank says of itself and its node before the training, and which nodes are bad. No torch.

Each rank (`launch/cluster/preflight_rank.py`) keeps one small file of how far it has come, so that a node that never
came, or stays behind, has a name even if nothing answers any more.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.cluster.profile import PreflightConfig
from pretrain.run_dir import RunDir

# How far a rank has come: it runs; its node and device are sound; it has reached the first node; the sum is right.
STAGES = ("came", "sound", "reached", "summed")
WORDS = {
    "came": "did not finish looking at itself",
    "sound": "did not reach the first node",
    "reached": "did not come through the all-reduce",
}


@dataclass(frozen=True)
class RankReport:
    """What one rank says.

    problem: of its node, found before the ranks meet. complaint: of the meeting, which may be another's fault.
    clock: epoch seconds right after the all-reduce, which all ranks leave at the same time.
    versions: what must be the same on all nodes, from the first rank of each.
    all_reduce_seconds: of the second one, connections being there.
    """

    rank: int
    node: str
    stage: str
    problem: str = ""
    complaint: str = ""
    clock: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    all_reduce_seconds: float | None = None

    def write(self, folder: Path) -> None:
        path = report_path(folder, self.rank)
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(scratch, path)


@dataclass(frozen=True)
class Findings:
    """bad: what is wrong with each bad node. fault: what is wrong with no node in particular, "" for nothing."""

    bad: dict[str, str] = field(default_factory=dict)
    fault: str = ""

    @property
    def words(self) -> str:
        """ "" if all is well."""
        return "; ".join(filter(None, [*(f"{node}: {reason}" for node, reason in self.bad.items()), self.fault]))


def preflight_folder(run: RunDir) -> Path:
    return run.logs / "preflight"


def report_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"


def new_folder(run: RunDir) -> Path:
    """An empty folder for reports."""
    folder = preflight_folder(run)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_reports(folder: Path, ranks: int) -> dict[int, RankReport]:
    """The reports that are there, by rank."""
    reports = {}
    for rank in range(ranks):
        try:
            reports[rank] = RankReport(**json.loads(report_path(folder, rank).read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError, TypeError):
            continue
    return reports


def judge_preflight(
    nodes: Sequence[str], ranks_per_node: int, reports: Mapping[int, RankReport], limits: PreflightConfig
) -> Findings:
    """Which nodes are bad. Pure.

    nodes: in Slurm's order; rank r is on nodes[r // ranks_per_node].

    What a node says against itself counts first: it leaves the others waiting, who are not to blame. What is said of
    more than half of the nodes is the fault of none of them.
    """
    ranks = len(nodes) * ranks_per_node
    by_node = {
        node: [reports.get(n * ranks_per_node + i) for i in range(ranks_per_node)] for n, node in enumerate(nodes)
    }
    bad = _against_themselves(by_node) or _other_versions(by_node, nodes)
    if not bad:
        behind = any(report is None or report.stage != STAGES[-1] for told in by_node.values() for report in told)
        bad = _behind(by_node, ranks_per_node) if behind else _other_clocks(by_node, limits.clock_skew_seconds)
        if behind and not bad:
            return Findings(fault=f"the {ranks} ranks could not meet{_complaints(reports)}")
    if len(bad) > len(nodes) / 2:
        node, reason = next(iter(bad.items()))
        return Findings(fault=f"on {len(bad)} of {len(nodes)} nodes something is wrong, such as on {node}: {reason}")
    return Findings(bad)


Told = Mapping[str, Sequence[RankReport | None]]


def _against_themselves(by_node: Told) -> dict[str, str]:
    problems = {
        node: [report.problem for report in told if report and report.problem] for node, told in by_node.items()
    }
    return {node: said[0] for node, said in problems.items() if said}


def _other_versions(by_node: Told, nodes: Sequence[str]) -> dict[str, str]:
    """Nodes that have another version of something than most have; in a tie, than the first has."""
    versions = {node: told[0].versions for node, told in by_node.items() if told[0] is not None and told[0].versions}
    bad: dict[str, str] = {}
    for name in sorted({name for of_node in versions.values() for name in of_node}):
        counts = Counter(versions[node].get(name, "none") for node in nodes if node in versions)
        usual = counts.most_common(1)[0][0]  # the first one met, of those that are as frequent
        for node, of_node in versions.items():
            if of_node.get(name, "none") != usual:
                bad.setdefault(node, f"{name} is {of_node.get(name, 'none')}, not {usual} as elsewhere")
    return bad


def _behind(by_node: Told, ranks_per_node: int) -> dict[str, str]:
    """Nodes with a rank that has not come as far as the foremost; none if all are at the same place.

    As long as the first node, where all meet, is not there itself, nobody else can reach it.
    """
    progress = [min(_stage(report) for report in told) for told in by_node.values()]
    # Who waits in the all-reduce may be a little ahead of who waits there, too: up to there all are alike.
    foremost = min(max(progress), STAGES.index("reached" if progress[0] >= STAGES.index("sound") else "sound"))
    bad = {}
    for number, (node, told) in enumerate(by_node.items()):
        if progress[number] < foremost:
            local = min(range(ranks_per_node), key=lambda rank: _stage(told[rank]))
            report = told[local]
            how = "did not start" if report is None else WORDS[report.stage]
            bad[node] = f"rank {number * ranks_per_node + local} {how}"
    return bad


def _stage(report: RankReport | None) -> int:
    return -1 if report is None else STAGES.index(report.stage)


def _other_clocks(by_node: Told, most_seconds: float) -> dict[str, str]:
    clocks = {
        node: told[0].clock for node, told in by_node.items() if told[0] is not None and told[0].clock is not None
    }
    usual = sorted(clocks.values())[(len(clocks) - 1) // 2] if clocks else 0.0
    return {
        node: f"its clock is {clock - usual:+.1f} s off"
        for node, clock in clocks.items()
        if abs(clock - usual) > most_seconds
    }


def _complaints(reports: Mapping[int, RankReport]) -> str:
    said = [
        f"rank {report.rank} on {report.node}: {report.complaint}" for report in reports.values() if report.complaint
    ]
    return f"; {said[0]}" if said else ""


def slowest_all_reduce(reports: Mapping[int, RankReport]) -> dict[str, Any]:
    """For the record: {} where there was none."""
    times = [report.all_reduce_seconds for report in reports.values() if report.all_reduce_seconds is not None]
    return {"all_reduce_seconds": max(times)} if times else {}


def further(report: RankReport, stage: str, folder: Path, **said: Any) -> RankReport:
    """The report of a rank that has come one stage further, or has something to say; written."""
    now = replace(report, stage=stage, **said)
    now.write(folder)
    return now
