"""A run on the virtual cluster as a test sees it: by the command line, and by what it writes into its folder."""

import json
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from pretrain.checkpoint.folder import newest_checkpoint
from pretrain.checkpoint.index import read_index
from pretrain.run_dir import RunDir, read_events
from tests.conftest import command
from tests.slurm.cluster import PATIENCE_SECONDS, Cluster, ranks, supervisor, wait_for
from tests.slurm.faulty import Fault, FaultyPython

EXACT = ("loss", "grad_norm", "lr", "tokens", "position")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class ClusterRun:
    """One run, in `folder / "run"`, with a profile and a faulty Python of its own beside it."""

    def __init__(self, cluster: Cluster, folder: Path, faults: Sequence[Fault] = (), **profile: Any) -> None:
        self.cluster, self.dir = cluster, RunDir(folder / "run")
        self.python = FaultyPython(folder / "python", faults)
        self.profile_path = folder / "virtual.yaml"
        settings = {
            "partition": "main",
            "time_limit": "30",
            "cpus_per_rank": 1,
            "python": str(self.python.path),
            "environment": {"OMP_NUM_THREADS": "1"},
            **profile,
        }
        self.profile_path.write_text(yaml.safe_dump(settings))

    # ---------------------------------------------------------------------------------- the command line

    def steppe(self, *words: object, code: int = 0) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end; `code` is the exit code it must have."""
        done = subprocess.run(
            command(*words),
            capture_output=True,
            text=True,
            env=self.cluster.environment,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert done.returncode == code, f"exit code {done.returncode}, not {code}: {done.stdout}\n{done.stderr}"
        return done

    def submit(self, recipe: str, *words: object) -> None:
        """`steppe submit` with this run's profile and folder."""
        self.steppe("submit", recipe, "--cluster", self.profile_path, "--run-dir", self.dir.path, *words)

    def status(self) -> dict[str, Any]:
        """`steppe status --json`."""
        return json.loads(self.steppe("status", self.dir.path, "--json").stdout)

    # ------------------------------------------------------------------------------------ what it has written

    @property
    def job_id(self) -> int:
        """The newest job."""
        return int(json.loads(self.dir.job_path.read_text())["job_ids"][-1])

    def events(self, kind: str) -> list[dict[str, Any]]:
        return read_events(self.dir.events_path, kind) if self.dir.events_path.is_file() else []

    def attempts(self, kind: str) -> list[dict[str, Any]]:
        """Lines of attempts.jsonl of one type."""
        return read_events(self.dir.attempts_path, kind) if self.dir.attempts_path.is_file() else []

    def steps_since_start(self) -> list[int]:
        """The steps that the newest attempt has made."""
        told = read_events(self.dir.events_path) if self.dir.events_path.is_file() else []
        starts = [number for number, event in enumerate(told) if event["type"] == "start"]
        return [event["step"] for event in told[starts[-1] :] if event["type"] == "step"] if starts else []

    # ------------------------------------------------------------------------------------------------- waiting

    def wait_for(self, what: str, look: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
        """As in `tests.slurm.cluster`; what the run has said is shown when it does not come."""
        try:
            return wait_for(what, look, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.told()}") from None

    def wait_until_held(self, step: int, start: int) -> dict[int, psutil.Process]:
        """Wait until the `start`-th attempt that came so far as to train is held before a step (see `hold` of
        `tests.slurm.faulty`); returns its ranks by number."""
        self.wait_for(
            f"step {step - 1} of start {start}",
            lambda: len(self.events("start")) == start and self.steps_since_start()[-1:] == [step - 1],
        )
        return ranks(self.job_id)

    def wait_for_attempts(self, count: int, kind: str = "attempt") -> dict[str, Any]:
        """Wait for the `count`-th line of a type in attempts.jsonl, and return it."""
        self.wait_for(f"{kind} {count}", lambda: len(self.attempts(kind)) >= count)
        return self.attempts(kind)[count - 1]

    def wait_for_end(self, state: str) -> None:
        """Wait until Slurm has done with the newest job, which must be in this state then."""
        ended = self.wait_for("the job to end", lambda: (word := self.state()) in ENDED and word)
        assert ended == state, f"the job has ended as {ended}, not {state}\n{self.told()}"

    def tell(self, number: signal.Signals) -> None:
        """Send the newest job's batch script a signal, as a near time limit does. Not by scancel, which for a task of
        an array complains, and sends it again and again."""
        supervisor(self.job_id).send_signal(number)

    def state(self) -> str:
        """The newest job's, in Slurm's words."""
        return self.cluster.jobs(self.job_id)[self.job_id]["state"]

    def told(self) -> str:
        """The end of everything that the run has said: for a person who looks for what went wrong."""
        said = [self.cluster.ask("squeue", "--states=all", "--long")]
        logs = sorted(self.dir.logs.glob("*")) if self.dir.logs.is_dir() else []
        daemons = sorted((self.cluster.folder / "log").glob("*.log"))
        for path in (self.dir.attempts_path, self.dir.events_path, *logs, *daemons):
            if path.is_file():
                lines = path.read_text(errors="replace").splitlines()[-15:]
                said.append("\n".join([f"----- {path.name}", *(line[:400] for line in lines)]))
        return "\n".join(said)


Curve = dict[int, tuple[Any, ...]]


def curve(run: Path) -> Curve:
    """What must repeat in every digit, by step; of a step made more than once, the last. A skipped step's own loss and
    norm are what made it be skipped, so they are left out."""
    steps = {event["step"]: event for event in read_events(RunDir(run).events_path, "step")}
    return {
        step: tuple(None if event["skipped"] and key in ("loss", "grad_norm") else event[key] for key in EXACT)
        for step, event in sorted(steps.items())
    }


def skips(run: Path) -> list[str]:
    """What the run has left out in the end, as settings of a run that leaves it out from its start on."""
    steps = {event["step"]: event for event in read_events(RunDir(run).events_path, "step")}
    updates = sorted(step for step, event in steps.items() if event["skipped"])
    newest = newest_checkpoint(RunDir(run).checkpoints)
    assert newest is not None
    trainer = read_index(newest).trainer
    assert trainer is not None
    data: list[list[int]] = []
    for start, end in trainer["left_out"]:  # sorted; going back twice leaves out one place twice
        if data and start <= data[-1][1]:
            data[-1][1] = max(data[-1][1], end)
        else:
            data.append([start, end])
    return [f"skips.updates={updates}", f"skips.data={data}"]


def difference(run: Path, reference: Path) -> str:
    """Where two curves are apart, in words; empty if they are one and the same."""
    ours, theirs = curve(run), curve(reference)
    if ours.keys() != theirs.keys():
        return f"steps {sorted(ours.keys() ^ theirs.keys())} are in one of them only"
    apart = [step for step in ours if ours[step] != theirs[step]]
    return f"{len(apart)} steps differ, first {apart[0]}: {ours[apart[0]]}, {theirs[apart[0]]}" if apart else ""
