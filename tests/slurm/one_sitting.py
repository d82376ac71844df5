"""One run on a cluster of virtual nodes that meets, in one sitting and with nobody looking after it, a time limit, a
hang, a preemption, a node crash, a gradient that is not a number and a loss spike; and then is held against a run that
met none of them and left out from its start what the first came to leave out.

    python -m tests.slurm.one_sitting [--folder DIR] [--model demo|tiny] [--steps 150]

Cluster, jobs, ranks and faults are real. This program only makes the trouble: what is done about it, the run does.
Needs what `cluster.sh` does. The demo's model, 10 M parameters on four ranks, takes two cores some fifteen minutes.
"""

import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from launch.demo import Demo
from pretrain.run_dir import read_events
from tests.conftest import command, environment
from tests.slurm.cluster import Cluster, why_not
from tests.slurm.faulty import Fault, once
from tests.slurm.runs import ClusterRun, curve, difference, skips

RANKS = 4  # one a node
SPARE_NODES = 1  # so that the run goes on when a node is gone
TIME_LIMIT_MINUTES = 3
HANG_SECONDS = 60
LEAST_STEP_SECONDS = 2.0
LEAST_STEPS = 130  # a time limit's worth, and all that happens afterwards
BATCH = 8  # sequences
# Settings of the model that the longest tests take: the same story in less time for a step.
TINY = (
    "model={hidden_size: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, ffn_size: 48}",
    "data.sequence_length=64",
    "optimizer.lr=1e-2",
)
# Of each type of event, what is shown.
SHOWN = {
    "submitted": ("job_id", "nodes", "ranks"),
    "attempt": ("nodes", "checkpoint"),
    "preflight": ("seconds", "bad", "fault"),
    "signal": ("name",),
    "attempt_end": ("outcome", "action", "why"),
    "rewind": ("step", "to_step", "left_out", "zscore"),
    "checkpoint_failed": ("step", "message"),
}

console = Console(stderr=True, highlight=False)


class Sitting:
    """The run under trouble, in `folder`, on a cluster that is up."""

    def __init__(self, cluster: Cluster, folder: Path, model: str, steps: int) -> None:
        self.cluster, self.folder, self.model = cluster, folder, model
        self.demo = Demo(folder, steps, RANKS, console)
        profile: dict[str, Any] = {
            "time_limit": str(TIME_LIMIT_MINUTES),
            "signal_lead_seconds": 45,
            "local_folder": f"{cluster.local}/$SLURM_JOB_ID",
            "preflight": {"free_gigabytes": 0.5},
        }
        self.run = ClusterRun(cluster, folder, **profile)
        # A fast machine would be through with it before all has happened.
        self.run.python.add(Fault("slow", rank=0, seconds=LEAST_STEP_SECONDS))
        self.settings = [
            f"data.sources=[{{name: stdlib, path: '{folder / 'data' / 'train'}'}}]",
            f"schedule={{total_steps: {steps}, warmup_steps: {steps // 10}}}",
            f"batch={{global_batch_size: {BATCH}, micro_batch_size: {BATCH // RANKS}}}",
            "checkpoint={every_steps: 10, keep: 3}",
            "evaluation.every_steps=0",
            f"health={{hang_seconds: {HANG_SECONDS}, replica_check_every_steps: 20}}",
            "health={spike_zscore: 8, spike_window: 16}",
            *(TINY if model == "tiny" else ()),
        ]
        self.spike_positions = (0, 0)

    def words(self, *more: str) -> list[str]:
        """`--set` words."""
        return [word for setting in (*self.settings, *more) for word in ("--set", setting)]

    def prepare(self) -> None:
        """Text of this machine as token shards."""
        for act in (self.demo.collect_text, self.demo.train_tokenizer, self.demo.prepare):
            act()

    def meet(self) -> None:
        """All the trouble, one after the other, and the end of the run. Whatever does not come is an AssertionError."""
        run = self.run
        self.say("a gradient on rank 2 will not be a number, at step 5")
        run.python.add(once("nan", 5, rank=2))
        run.submit("demo", "--nodes", RANKS, *self.words())

        self.say(f"the job has a time limit of {TIME_LIMIT_MINUTES} minutes")
        run.wait_for("the time limit", lambda: self.ended(1), seconds=600)

        step = self.some_steps(start=2) + 4
        self.say(f"rank 3 will hang in step {step}")
        run.python.add(once("hang", step, rank=3))
        run.wait_for("the hang to be found out", lambda: self.ended(2), seconds=600)

        self.some_steps(start=3)
        self.say("a job of a higher partition takes all nodes for 20 seconds")
        words = ("--partition=high", f"--nodes={self.cluster.nodes}", "--exclusive", "--output=/dev/null")
        self.cluster.ask("sbatch", *words, "--wrap", "sleep 20")
        run.wait_for("the preemption", lambda: self.ended(3), seconds=600)

        self.some_steps(start=4)
        lost = int(run.attempts("attempt")[-1]["nodes"][0].removeprefix("n"))
        self.say(f"node n{lost}, the batch host, crashes")
        self.cluster.kill_node(lost)

        self.some_steps(start=5)
        position = run.events("step")[-1]["position"]
        self.spike_positions = (position + 12 * BATCH, position + 13 * BATCH)
        self.say(f"the data at positions {self.spike_positions} will make no sense")
        run.python.add(Fault("garbage", positions=self.spike_positions))
        run.wait_for_end("COMPLETED")

    def some_steps(self, start: int) -> int:
        """Wait until the `start`-th attempt has made a few steps; returns the last one."""
        self.run.wait_for(
            f"steps of start {start}",
            lambda: len(self.run.events("start")) >= start and len(self.run.steps_since_start()) > 5,
            seconds=600,
        )
        return self.run.steps_since_start()[-1]

    def ended(self, count: int) -> bool:
        return len(self.run.attempts("attempt_end")) >= count

    def check(self) -> None:
        """Every kind of trouble has come, and was met as it should be. Raises AssertionError."""
        run = self.run
        # Time limit, hang, preemption; the attempt whose batch host crashed says nothing; perhaps another time limit.
        actions = [end["action"] for end in run.attempts("attempt_end")]
        assert actions[:3] == ["requeue", "requeue", "slurm"], actions
        assert set(actions[3:-1]) <= {"requeue"}, actions
        assert actions[-1] == "done", actions
        assert {signal["name"] for signal in run.attempts("signal")} >= {"TERM"}
        assert [event["step"] for event in run.events("step") if event["skipped"]] == [5]
        (rewind,) = run.events("rewind")
        first, last = rewind["left_out"]
        assert first <= self.spike_positions[0] < self.spike_positions[1] <= last, rewind

    def reference(self) -> Path:
        """The same layout on this machine, with the skips in its config."""
        path = self.folder / "reference"
        words = self.words(*skips(self.run.dir.path))
        line = command("train", "demo", "--nproc", RANKS, "--run-dir", path, *words)
        subprocess.run(line, env=environment(), check=True, stdout=subprocess.DEVNULL)
        return path

    def say(self, text: str) -> None:
        console.print(f"{time.strftime('%H:%M:%S')}  [bold]{text}")

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show what the run writes, while it does."""
        over = threading.Event()

        def follow() -> None:
            told = {self.run.dir.attempts_path: 0, self.run.dir.events_path: 0}
            while not over.wait(0.5):
                for path, seen in told.items():
                    events = read_events(path) if path.is_file() else []
                    for event in events[seen:]:
                        show(event)
                    told[path] = len(events)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        yield
        over.set()
        thread.join()


def show(event: dict[str, Any]) -> None:
    """One line for a person, of what a person would want to know."""
    when, kind = time.strftime("%H:%M:%S", time.localtime(event["time"])), event["type"]
    if kind == "step" and (event["skipped"] or event["step"] % 10 == 0):
        note = ", its update skipped" if event["skipped"] else ""
        console.print(f"{when}    step {event['step']}: loss {event['loss']:.4f}{note}", style="dim")
    elif kind in SHOWN:
        told = ", ".join(f"{key} {event[key]}" for key in SHOWN[kind] if event[key])
        console.print(f"{when}  {kind}: {told}", markup=False, soft_wrap=True)


def sit(folder: Path, model: str, steps: int) -> Sitting:
    """All of it. Raises AssertionError when anything does not come out as promised."""
    with Cluster(RANKS + SPARE_NODES) as cluster:
        sitting = Sitting(cluster, folder, model, steps)
        acts: list[tuple[str, Callable[[], object]]] = [("text", sitting.prepare), ("trouble", sitting.meet)]
        for name, act in acts:
            console.rule(f"[bold]{name}", align="left")
            with sitting.shown():
                act()
        sitting.check()
        console.rule("[bold]the run that leaves it out from the start", align="left")
        apart = difference(sitting.run.dir.path, sitting.reference())
        assert not apart, apart
    return sitting


def main(
    folder: Annotated[Path | None, typer.Option(help="A new folder; by default one under the temporary ones.")] = None,
    model: Annotated[str, typer.Option(help="demo: 10 M parameters. tiny: 50 thousand.")] = "demo",
    steps: Annotated[int, typer.Option(min=LEAST_STEPS)] = 150,
) -> None:
    reason = why_not()
    if reason is not None:
        raise typer.BadParameter(reason)
    folder = Path(tempfile.mkdtemp(prefix="one-sitting-")) if folder is None else folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sitting = sit(folder, model, steps)
    console.rule("[bold]what became of it", align="left")
    subprocess.run(command("status", sitting.run.dir.path), check=True)
    count = len(curve(sitting.run.dir.path))
    print(
        f"\n{count} steps: positions, learning rates, losses and gradient norms are in every digit those of a run that "
        f"left out from its start what this one came to leave out: {', '.join(skips(sitting.run.dir.path))}\n"
        f"All that happened: steppe report {sitting.run.dir.path}"
    )


if __name__ == "__main__":
    typer.run(main)
