"""`steppe train RECIPE --rehearse`: the run made small, by the product's own commands, before it queues for GPUs."""

import math
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline.config import SourceConfig
from launch.rehearsal_report import Report, Stage, in_words
from launch.run import resume, start
from launch.run_checks import check_data
from launch.shrink import (
    STOP_AFTER,
    VOCABULARY,
    full_layout_config,
    plain_config,
    rehearsal_config,
    rehearsal_layout,
)
from pretrain.config import RunConfig
from pretrain.deepspeed_config import deepspeed_config
from pretrain.layout import Layout
from pretrain.outcome import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, Outcome, exit_code_of
from pretrain.recipe import dump_config
from pretrain.run_dir import RunDir, read_events

# Of Python's own library: packages to train on and to hold out, and a file to score.
TRAINING_TEXT, HELD_OUT_TEXT, SCORED_TEXT = "email", "json", "json/scanner.py"
# How far a layout may be from one plain rank, relative: (losses, gradient norms). The tests of layouts hold as much.
TOLERANCES = {"fp32": (1e-5, 1e-5), "bf16": (1e-3, 1e-2), "fp16": (1e-3, 1e-2)}


class StageError(Exception):
    """A stage came to another end than it should, though nothing else was raised."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def rehearse(config: RunConfig, world: int, run_dir: Path | None) -> Report:
    """Rehearse a run meant for `world` ranks, in `run_dir`, or in a temporary folder that stays only if a stage fails.

    Raises ValueError, before anything starts, if the recipe is impossible on so many ranks, if its data are here and
    damaged, or if `run_dir` holds anything.
    """
    from pretrain.device import hide_gpus

    hide_gpus()
    if run_dir is not None and run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ValueError(f"{run_dir} exists and is not empty: choose another --run-dir, or leave it out")
    deepspeed_config(config, Layout.of(config, world).data)
    has_data = any(Path(source.path).exists() for source in config.data.sources)
    if has_data:
        check_data(config)
    folder = Path(tempfile.mkdtemp(prefix="steppe-rehearsal-")) if run_dir is None else run_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rehearsal = Rehearsal(config, world, has_data, folder)
    try:
        stages = rehearsal.run()
    except BaseException:  # such as Ctrl-C
        if run_dir is None:
            shutil.rmtree(folder)
        raise
    passing = run_dir is None and stages[-1].exit_code in (EXIT_DONE, EXIT_STOPPED)
    if passing:
        shutil.rmtree(folder)
    kept = None if passing else folder
    return Report(config, rehearsal.rehearsed, rehearsal.full, rehearsal.small, has_data, stages, kept)


class Rehearsal:
    """The stages of one rehearsal, in a folder of its own, of a recipe that is possible at its full size."""

    def __init__(self, config: RunConfig, world: int, has_data: bool, folder: Path) -> None:
        from pretrain.device import computes_in

        self.config, self.has_data, self.folder = config, has_data, folder
        self.full, self.small = Layout.of(config, world), rehearsal_layout(config, world)
        self.computable = config if computes_in(config.precision) else config.model_copy(update={"precision": "bf16"})
        self.rehearsed, self.ranks = rehearsal_config(self.computable, world, keep_vocabulary=has_data)
        self.run_dir, self.plain_dir = RunDir(folder / "run"), RunDir(folder / "one_rank")
        self.console = Console(stderr=True, highlight=False)

    def run(self) -> list[Stage]:
        """Every stage in turn, up to the first that goes wrong."""
        acts: dict[str, Callable[[], str]] = {
            "recipe": self.describe,
            "data": self.check_or_make_data,
            **({"full layout": self.step_at_full_layout} if self.small != self.full else {}),
            "train": self.train,
            "resume": self.resume,
            "evaluate": self.evaluate,
            "as on one rank": self.compare,
        }
        stages: list[Stage] = []
        for name, act in acts.items():
            self.console.rule(f"[bold]{name}", align="left")
            started = time.monotonic()
            try:
                code, said = EXIT_DONE, act()
            except StageError as error:
                code, said = error.exit_code, str(error)
            except Exception as error:
                code, said = exit_code_of(error), f"{type(error).__name__}: {' '.join(str(error).split())}"
            stages.append(Stage(name, code, said, time.monotonic() - started))
            self.console.print(said, markup=False, soft_wrap=True)
            if code != EXIT_DONE:
                break
        return stages

    # Each stage returns its line for the table.

    def describe(self) -> str:
        return f"possible: {in_words(self.full, self.config)}"

    def check_or_make_data(self) -> str:
        if self.has_data:
            return "the recipe's own: manifests, sizes, tokenizer and vocabulary fit"
        from data_pipeline.corpus.config import corpus_of
        from data_pipeline.corpus.reading import read_documents
        from data_pipeline.preparation.job import prepare
        from data_pipeline.tokenizer_training import train_tokenizer

        tokenizer = self.folder / "tokenizer.model"
        documents = read_documents(corpus_of([library(TRAINING_TEXT)]))
        train_tokenizer((document.text for document in documents), VOCABULARY, tokenizer)
        made = {text: self.folder / text for text in (TRAINING_TEXT, HELD_OUT_TEXT)}
        tokens = [prepare([str(library(text))], tokenizer, out).tokens for text, out in made.items()]
        self.rehearsed = with_sources(self.rehearsed, made[TRAINING_TEXT], made[HELD_OUT_TEXT])
        return f"{tokens[0]:,} tokens of Python's own library stand in for the recipe's, which are not here"

    def step_at_full_layout(self) -> str:
        path, log = self.folder / "full_layout.yaml", self.folder / "full_layout.log"
        dump_config(full_layout_config(self.computable, self.full.world), path)
        last = self.full.world - 1
        words = [str(path), str(self.full.world), "0", str(last)]
        with open(log, "w", encoding="utf-8") as output:
            command = [sys.executable, "-P", "-m", "pretrain.rehearse", *words]
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            said = log.read_text(encoding="utf-8").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise StageError(EXIT_FAILED, f"{said[0]} (traceback in {log})")
        return (
            f"ranks 0 and {last:,} of {self.full.world:,} built and made a step with the others faked: "
            "groups and shapes fit, numbers mean nothing"
        )

    def train(self) -> str:
        path = self.folder / "rehearsal.yaml"
        dump_config(self.rehearsed, path)
        check_done(start(str(path), [], self.run_dir.path, self.ranks, STOP_AFTER))
        losses = [event["loss"] for event in read_events(self.run_dir.events_path, "step")]
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        return f"{len(losses)} steps on {ranks}, loss {losses[0]:.4f} to {losses[-1]:.4f}, saved"

    def resume(self) -> str:
        check_done(resume(self.run_dir.path, [], [], self.ranks, None))
        events = read_events(self.run_dir.events_path, "step")
        held_out = read_events(self.run_dir.events_path, "evaluation")[-1]["by_source"]
        losses = ", ".join(f"{measures['loss']:.4f} on {name}" for name, measures in held_out.items())
        return f"from the checkpoint to step {events[-1]['step']}, loss {events[-1]['loss']:.4f}; validation {losses}"

    def evaluate(self) -> str:
        self.scored = score(self.run_dir)
        return f"perplexity {self.scored['perplexity']:.1f} on {self.scored['tokens']:,} tokens, from the checkpoint"

    def compare(self) -> str:
        path = self.folder / "one_rank.yaml"
        dump_config(plain_config(self.rehearsed), path)
        check_done(start(str(path), [], self.plain_dir.path, 1, None))
        found, expected = figures(self.run_dir), figures(self.plain_dir)
        found["losses"].append(self.scored["loss"])
        expected["losses"].append(score(self.plain_dir)["loss"])
        rounded = "bf16" in (self.rehearsed.precision, self.rehearsed.parallel.reduce_dtype)
        limits = TOLERANCES["bf16" if rounded else self.rehearsed.precision]
        said = []
        for (kind, values), limit in zip(found.items(), limits, strict=True):
            furthest = max(relative(*pair) for pair in zip(values, expected[kind], strict=True))
            if not furthest <= limit:
                raise StageError(
                    EXIT_FAILED,
                    f"{kind} are up to {furthest:.1e} away from those of one plain rank, more than {limit:.0e}: "
                    f"{', '.join(f'{x:.7g}' for x in values)} instead of "
                    f"{', '.join(f'{x:.7g}' for x in expected[kind])}",
                )
            said.append(f"{kind} within {furthest:.0e} (limit {limit:.0e})")
        return f"without parallelism, stop and resume the same: {', '.join(said)}"


def library(part: str) -> Path:
    """A file or folder of the sources of Python's own library. Raises ValueError if this machine has none."""
    path = Path(sysconfig.get_paths()["stdlib"]) / part
    if not path.exists():
        raise ValueError(f"{path} does not exist: rehearse with a Python that has the sources of its library")
    return path


def with_sources(config: RunConfig, training: Path, held_out: Path) -> RunConfig:
    """The config with all of its sources in these two folders, under the names and weights that they have."""

    def at(path: Path, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        return tuple(source.model_copy(update={"path": str(path)}) for source in sources)

    data = config.data.model_copy(update={"sources": at(training, config.data.sources)})
    evaluation = config.evaluation.model_copy(update={"sources": at(held_out, config.evaluation.sources)})
    return config.model_copy(update={"data": data, "evaluation": evaluation})


def check_done(outcome: Outcome) -> None:
    """Raise StageError unless the attempt at a run ended as it should."""
    if outcome.status != "done":
        raise StageError(outcome.exit_code, outcome.message)


def score(run: RunDir) -> dict[str, Any]:
    """What `steppe eval` says of a run on a file that is always there."""
    from pretrain.evaluation.job import EvaluationJob, evaluate_job
    from pretrain.evaluation.result import result
    from pretrain.evaluation.texts import texts_config

    texts = texts_config([f"library={library(SCORED_TEXT)}"])
    with tempfile.TemporaryDirectory(prefix="steppe-eval-") as folder:
        evaluate_job(EvaluationJob(str(run.path), texts), Path(folder))
        return result(Path(folder))


def figures(run: RunDir) -> dict[str, list[float]]:
    """The losses of a run's steps and validations, and the gradient norms of its steps."""
    steps = read_events(run.events_path, "step")
    events = read_events(run.events_path, "evaluation")
    validations = [measures["loss"] for event in events for measures in event["by_source"].values()]
    return {
        "losses": [event["loss"] for event in steps] + validations,
        "gradient norms": [event["grad_norm"] for event in steps],
    }


def relative(found: float, expected: float) -> float:
    """How far a number is from another, as a share of that; infinitely far if either is no number."""
    distance = 0.0 if found == expected else abs(found - expected) / abs(expected)
    return math.inf if math.isnan(distance) else distance
