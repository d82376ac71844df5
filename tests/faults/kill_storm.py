"""A kill storm: a small run is killed by SIGKILL again and again, each time resumed on another layout, and must be the
run that nobody disturbed.

    python -m tests.faults.kill_storm --kills 200 --seed 0 [--model moe] [--folder DIR] [--json]

All of it goes through the real command line. What each attempt must show:

- It resumes after the newest step whose checkpoint bears its final name. Nothing is passed over.
- That step is no earlier than the last `checkpoint` event, which is written once a checkpoint is committed.
- Where only the launcher is killed, the ranks save and end, and no step is lost at all.

And in the end every step is there, has seen the same samples at the same learning rate as in two undisturbed runs on
different layouts, and its loss (fp32) is within three times the difference between those two.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from pretrain.outcome import EXIT_DONE, EXIT_FAILED, EXIT_WRONG_INPUT
from pretrain.run_dir import RunDir
from tests.conftest import STDLIB, Corpus, command, environment
from tests.faults.storm_attempt import Attempt, StormError, unfinished_saves
from tests.faults.storm_curves import compare, read_curve, values
from tests.faults.storm_plan import MODEL_SETTINGS, SETTINGS, Kill, Model, Setup, draw_plan, undisturbed_setups
from tests.faults.storm_report import Report, StormProgress, Struck, print_report

PATIENCE_SECONDS = 300.0  # for ranks to start, meet and load, or for a step, on a machine that does much else
GONE_SECONDS = 120.0  # for ranks to finish their step and save when their launcher or a peer is gone
FINISH_SECONDS = 3600.0
TAIL_STEPS = 10  # after the last kill
# Where none has been timed.
USUAL_START_SECONDS, USUAL_STEP_SECONDS, USUAL_SAVE_SECONDS = 8.0, 0.2, 0.05


class Storm:
    """The run under the storm, in `folder`, on a corpus that is there."""

    def __init__(self, folder: Path, corpus: Corpus, model: Model, total_steps: int) -> None:
        self.folder, self.run = folder, RunDir(folder / "storm")
        schedule = f"schedule={{warmup_steps: 20, total_steps: {total_steps}}}"
        self.settings = corpus.settings(*SETTINGS, schedule, *MODEL_SETTINGS[model])
        self.logs = folder / "attempts"
        self.logs.mkdir(parents=True)
        self.start_seconds = USUAL_START_SECONDS
        self.committed = 0  # the step of the last `checkpoint` event
        self.last_step = 0

    def attempt(self, name: str, run: RunDir, setup: Setup, *words: object) -> Attempt:
        """Start the run if it is none yet, else resume it."""
        if run.config_path.is_file():
            said: list[object] = ["resume", run.path, *setup.words(), *words]
        else:
            said = ["train", "58m", "--run-dir", run.path, *self.settings, *setup.words(), *words]
        return Attempt(said, run.events_path, self.logs / f"{name}.log")

    def strike(self, number: int, kill: Kill) -> Struck:
        """One attempt, killed. Raises StormError if anything promised does not hold."""
        begun, newest, unfinished = time.monotonic(), self.newest(), unfinished_saves(self.run.checkpoints)
        with self.attempt(f"{number:04d}", self.run, kill.setup) as attempt:
            ranks = self.await_moment(attempt, kill)
            victim = attempt.strike(kill.target, kill.which, ranks)
            attempt.wait_gone(GONE_SECONDS)
        resumed = self.check_start(attempt, newest)
        made = [event["step"] for event in attempt.tail.of("step")]
        self.last_step = made[-1] if made else self.last_step
        self.committed = max([self.committed, *(event["step"] for event in attempt.tail.of("checkpoint"))])
        now = self.newest()
        if now < self.committed:
            raise StormError(f"the checkpoint of step {self.committed} was committed; the newest now is step {now}")
        if victim == "launcher" and made and now != made[-1]:
            raise StormError(f"its launcher dead, an attempt made step {made[-1]} but saved {now}")
        return Struck(
            setup=kill.setup.name,
            victim=victim,
            resumed_after=resumed,
            last_step=made[-1] if made else None,
            newest=now,
            lost=self.last_step - now,
            during_save=bool(unfinished_saves(self.run.checkpoints) - unfinished),
            seconds=time.monotonic() - begun,
        )

    def await_moment(self, attempt: Attempt, kill: Kill) -> list[psutil.Process]:
        """Return when the kill is due, with the ranks that there are."""
        if kill.moment == "starting":
            early = attempt.begun + kill.delay * self.start_seconds
            while attempt.watch(early) and not attempt.tail.of("start"):
                pass
            return attempt.ranks()
        attempt.await_events("start", 1, PATIENCE_SECONDS)
        self.start_seconds = time.monotonic() - attempt.begun
        ranks = attempt.ranks()  # looked for in time: a save may be over in less
        attempt.await_events("step", kill.after_steps, PATIENCE_SECONDS)
        if kill.moment == "saving":
            attempt.await_save(self.run.checkpoints, PATIENCE_SECONDS)
            due = time.monotonic() + kill.delay * USUAL_SAVE_SECONDS
        else:
            due = time.monotonic() + kill.delay * pace(attempt.tail.of("step"))
        while attempt.watch(due):
            pass
        return ranks

    def finish(self, setup: Setup) -> int:
        """Resume once more and let it end, some steps on; returns its last step."""
        end, newest = self.last_step + TAIL_STEPS, self.newest()
        with self.attempt("last", self.run, setup, "--stop-after", end) as attempt:
            attempt.finish(FINISH_SECONDS)
        self.check_start(attempt, newest)
        return end

    def undisturbed(self, name: str, setup: Setup, end: int) -> RunDir:
        """The same run, so many steps of it, on one layout and in one go."""
        run = RunDir(self.folder / name)
        with self.attempt(name, run, setup, "--stop-after", end) as attempt:
            attempt.finish(FINISH_SECONDS)
        return run

    def newest(self) -> int:
        """The step of the newest checkpoint that bears its final name, 0 if there is none."""
        names = self.run.checkpoints.iterdir() if self.run.checkpoints.is_dir() else ()
        return max((int(found[1]) for path in names if (found := re.fullmatch(r"step_(\d+)", path.name))), default=0)

    def check_start(self, attempt: Attempt, newest: int) -> int | None:
        """The step after which the attempt resumed; None if it was killed before. Raises StormError if that is not the
        newest checkpoint's."""
        if "passed over" in attempt.log_path.read_text(encoding="utf-8", errors="replace"):
            raise StormError(f"a checkpoint was passed over: {attempt.said()}")
        starts = attempt.tail.of("start")
        if not starts:
            return None
        if starts[0]["step"] != newest:
            raise StormError(f"step {newest} is saved, yet it resumed after {starts[0]['step']}: {attempt.said()}")
        return newest


def pace(steps: list[dict[str, Any]]) -> float:
    """Seconds from the last step to the next, saves included, as far as the steps of an attempt tell."""
    return steps[-1]["time"] - steps[-2]["time"] if len(steps) > 1 else USUAL_STEP_SECONDS


def make_corpus(folder: Path) -> Corpus:
    """A package of the standard library, prepared by the command line."""
    made = Corpus(folder / "tokenizer.model", folder / "train", folder / "train", STDLIB / "email")
    folder.mkdir(parents=True)
    tokenizer = ("data", "train-tokenizer", "--input", made.text, "--vocab-size", 600, "--out", made.tokenizer)
    prepare = ("data", "prepare", "--input", made.text, "--tokenizer", made.tokenizer, "--out", made.train)
    for words in (tokenizer, prepare):
        done = subprocess.run(command(*words), capture_output=True, text=True, env=environment(), check=False)
        if done.returncode:
            raise StormError(f"the corpus could not be made: {done.stderr}")
    return made


def run_storm(report: Report, corpus: Corpus | None = None, progress: StormProgress | None = None) -> Report:
    """Fill the report. Without a corpus, one is made in the report's folder."""
    begun = time.monotonic()
    plan, last = draw_plan(report.kills, report.seed, report.model)
    try:
        corpus = corpus or make_corpus(report.folder / "corpus")
        # The run's schedule is far longer than the storm, so that the storm is not over before its time.
        storm = Storm(report.folder, corpus, report.model, total_steps=100 * len(plan) + 100)
        for number, kill in enumerate(plan, 1):
            report.struck.append(storm.strike(number, kill))
            if progress:
                progress.struck(report.struck)
        say = progress.say if progress else (lambda text: None)
        say("the last resume")
        end = storm.finish(last)
        say(f"{end} steps on two layouts, undisturbed")
        runs = {"storm": storm.run}
        for name, setup in zip(("undisturbed_a", "undisturbed_b"), undisturbed_setups(report.model), strict=True):
            runs[name] = storm.undisturbed(name, setup, end)
        curves = {name: read_curve(run.events_path) for name, run in runs.items()}
        report.curves = {
            name: {key: values(curve, key).tolist() for key in ("loss", "grad_norm")} for name, curve in curves.items()
        }
        report.comparison = compare(curves["storm"], curves["undisturbed_a"], curves["undisturbed_b"], end)
    except StormError as error:
        report.failure = f"kill {len(report.struck) + 1}: {error}" if len(report.struck) < len(plan) else str(error)
    report.seconds = time.monotonic() - begun
    return report


def check(kills: int, folder: Path | None) -> None:
    """Raise ValueError for what cannot be done."""
    if kills < 1:
        raise ValueError(f"--kills {kills}: give a number of 1 or more")
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--folder {folder} exists and is not empty: choose another")


def main(
    kills: Annotated[int, typer.Option(help="How many times the run is killed.")] = 200,
    seed: Annotated[int, typer.Option(help="Decides layouts, victims and moments.")] = 0,
    model: Annotated[Model, typer.Option(help="A dense model, or a mixture of experts.")] = "dense",
    folder: Annotated[Path | None, typer.Option(help="Where it happens, kept [default: a temporary one].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Kill a small run many times, resume it on other layouts, and compare it with undisturbed ones."""
    try:
        check(kills, folder)
    except ValueError as error:
        print(f"kill_storm: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_WRONG_INPUT) from None
    where = folder.resolve() if folder else Path(tempfile.mkdtemp(prefix="steppe-kill-storm-"))
    with StormProgress(kills) as progress:
        report = run_storm(Report(model, seed, kills, where), progress=progress)
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        print_report(report)
    if report.ok and folder is None:
        shutil.rmtree(where)
    if not report.ok:
        print(f"everything lies in {where}; repeat it with: {report.repeat}", file=sys.stderr)
    raise typer.Exit(EXIT_DONE if report.ok else EXIT_FAILED)


if __name__ == "__main__":
    typer.run(main)
