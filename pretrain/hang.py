"""Who is late in a hang: from the stacks of each rank to the call it is in, and from all ranks' reports to one line.

Pure: no file is read here, and no torch is imported, so that the process which watches a rank stays small.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

HANG = "Hang"  # the type of a rank's error where its watchdog has written it
OURS = ("launch", "pretrain", "model", "data_pipeline")
STOPPED_STATES = {"T": "stopped", "t": "held by a debugger"}
STATES = {**STOPPED_STATES, "D": "uninterruptible, as in a file system that does not answer", "Z": "dead"}

_THREAD = re.compile(r"(?:Thread|Current thread) (0x[0-9a-f]+)")
_FRAME = re.compile(r'  File "(.*)", line (\d+|\?+) in (.*)')


@dataclass(frozen=True)
class Report:
    """What a watchdog says of its rank.

    step, phase: of the last beat. state: of the process, a letter as in /proc/PID/stat.
    waiting: the function of torch.distributed that it is in, None if it is in none.
    call: `function (file:line)` of the innermost frame of our own packages, None if its stacks could not be had.
    """

    host: str
    step: int
    phase: str
    state: str
    seconds: float
    world: int
    waiting: str | None = None
    call: str | None = None

    @classmethod
    def of(cls, error: Mapping[str, Any]) -> "Report":
        """Of what a rank's error holds besides."""
        return cls(**{field.name: error[field.name] for field in fields(cls)})

    def __str__(self) -> str:
        where = f", in {self.call}" if self.call else ""
        waits = f", waiting in {self.waiting}" if self.waiting else ""
        state = f", {STATES[self.state]} (state {self.state})" if self.state in STATES else ""
        return f"no beat for {self.seconds:.0f} s after that of step {self.step} ({self.phase}){where}{waits}{state}"


@dataclass(frozen=True)
class Frame:
    """A frame of a stack."""

    path: str
    line: str
    function: str


def call_in(dump: str, main_thread: int, root: Path) -> tuple[str | None, str | None]:
    """(call, waiting) of a rank, as in Report, from what faulthandler writes of all its threads.

    main_thread: its identifier. root: the folder of our packages.
    The main thread is looked at, unless that waits for another thread of ours: then the one that keeps it waiting.
    """
    threads = _threads(dump)
    main = threads.pop(main_thread, [])
    looked_at = main
    if _waits_for_a_thread(main):
        busy = (stack for stack in threads.values() if _own(stack, root) and not _waits_for_a_thread(stack))
        looked_at = next(busy, main)
    own = _own(looked_at, root)
    call = f"{own[0].function} ({Path(own[0].path).relative_to(root)}:{own[0].line})" if own else None
    return call, looked_at[0].function if looked_at and "/torch/distributed/" in looked_at[0].path else None


def _threads(dump: str) -> dict[int, list[Frame]]:
    """Stacks, innermost frame first, by thread identifier."""
    stacks: dict[int, list[Frame]] = {}
    stack: list[Frame] = []
    for line in dump.splitlines():
        if thread := _THREAD.match(line):
            stack = stacks[int(thread[1], 16)] = []  # the last dump counts
        elif frame := _FRAME.match(line):
            stack.append(Frame(*frame.groups()))
    return stacks


def _own(stack: Iterable[Frame], root: Path) -> list[Frame]:
    """The frames of our packages."""
    folders = tuple(f"{root / package}/" for package in OURS)
    return [frame for frame in stack if frame.path.startswith(folders)]


def _waits_for_a_thread(stack: list[Frame]) -> bool:
    return bool(stack) and Path(stack[0].path).name in ("threading.py", "queue.py")


def late_ranks(reports: Mapping[int, Report]) -> tuple[list[int], str]:
    """The ranks that keep the others waiting, and why they are thought to; none where nothing tells them apart.

    A rank that waits in a collective stops to beat about when the culprit does, so time does not tell. What does: a
    process that is stopped, else one that has said nothing at all, unless another is seen to be late: at an earlier
    step, or not in a collective while others are. On GPUs ranks wait in whatever reads from the device: a rank that is
    in another call than most is late then.
    """
    stopped = [rank for rank, report in reports.items() if report.state in STOPPED_STATES]
    if stopped:
        return sorted(stopped), ""
    step = min(report.step for report in reports.values())
    first = {rank: report for rank, report in reports.items() if report.step == step}
    busy = [rank for rank, report in first.items() if report.waiting is None]
    suspects = busy or list(first)
    world = next(iter(reports.values())).world
    if len(suspects) < len(reports) or world == 1:
        return sorted(suspects), ""
    silent = [rank for rank in range(world) if rank not in reports]
    if silent and busy and len(busy) * 2 <= world:  # the launcher ended the others before they could report
        return sorted(busy), ""
    if silent:
        return silent, "killed or on a machine that is gone, without a word"
    calls = Counter((report.call, report.waiting) for report in reports.values())
    usual, count = calls.most_common(1)[0]
    if count * 2 > world:
        others = [rank for rank, report in reports.items() if (report.call, report.waiting) != usual]
        return sorted(others), ""
    return [], ""


def hang_line(reports: Mapping[int, Report]) -> str:
    """One line that names who is late, where, and what the others do. reports: by rank, at least one."""
    late, silence = late_ranks(reports)
    seconds = min(report.seconds for report in reports.values())
    others = [report for rank, report in reports.items() if rank not in late]
    line = f"no step was made for {seconds:.0f} s: "
    if not late:
        return f"{line}every rank is in {_places(others)}; none is seen to be late"
    line += f"{_named(late, reports)} {'is' if len(late) == 1 else 'are'} late, "
    line += silence or ", ".join(_facts(reports[late[0]]))
    if others:
        waits = all(report.waiting for report in others)
        line += f"; the others {'wait for it in' if waits else 'are in'} {_places(others)}"
    return line


def _named(ranks: Collection[int], reports: Mapping[int, Report]) -> str:
    """`rank 3 on n2`, or `ranks 3 on n2, 5 on n3 and 7 more`."""
    names = [f"{rank} on {reports[rank].host}" if rank in reports else str(rank) for rank in ranks]
    if len(names) > 4:
        names = [*names[:3], f"{len(names) - 3} more"]
    listed = " and ".join([*([", ".join(names[:-1])] if names[:-1] else []), names[-1]])
    return f"rank{'s' * (len(ranks) > 1)} {listed}"


def _facts(report: Report) -> list[str]:
    """Where a late rank is: its step and phase, its call, its state where that says something."""
    facts = [f"at step {report.step} ({report.phase})"]
    if report.call:
        facts.append(f"in {report.call}")
    if report.state in STATES:
        facts.append(f"{STATES[report.state]} (state {report.state})")
    return facts


def _places(reports: Collection[Report]) -> str:
    """Where ranks are, the usual place first: functions of torch.distributed, or calls of ours."""
    places = Counter(report.waiting or report.call or "a place that is not known" for report in reports)
    return ", ".join(place for place, _ in places.most_common(3))
