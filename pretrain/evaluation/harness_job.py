"""Benchmarks of one model from request to result, on one rank or on several that a launcher starts with this module.

lm-eval runs the tasks; it is an extra of the installation, and is imported where it is needed.
"""

import importlib.util
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from pretrain.device import peak_memory_bytes
from pretrain.engine import DTYPES
from pretrain.evaluation.job import PRECISIONS
from pretrain.evaluation.progress import PLAIN_SECONDS
from pretrain.evaluation.ranks import Ranks, Start, rank_main, run_on_ranks
from pretrain.load_model import LoadedModel, load_model


@dataclass(frozen=True)
class TasksJob:
    """Which model to ask what, as plain values, so that it can travel to ranks as JSON.

    tasks: names or patterns of tasks, groups and tags. task_folder: where more are than lm-eval has.
    num_fewshot: examples before each question, None for what a task says. limit: documents of a task, for trying out.
    window: tokens that the model sees at once, None for those that it was trained to see.
    add_bos_token: see `SteppeLM`. samples: a new folder for each document's requests and answers, a file a task.
    """

    model: str
    tasks: tuple[str, ...]
    task_folder: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    window: int | None = None
    batch_tokens: int | None = None
    step: int | Literal["best"] | None = None
    tokenizer: str | None = None
    precision: str = "fp32"
    offload: Literal["cpu", "disk"] | None = None
    add_bos_token: bool | None = None
    samples: str | None = None


def check_tasks(job: TasksJob) -> None:
    """What can be said of a job before a model runs. Raises ValueError for values out of range, for unknown tasks, and
    if lm-eval is not installed."""
    _check_values(job)
    from pretrain.evaluation.harness_tasks import find_tasks

    find_tasks(job.tasks, None if job.task_folder is None else Path(job.task_folder))


def run_tasks_job(job: TasksJob, nproc: int = 1, start: Start | None = None) -> dict[str, Any]:
    """Run the tasks; returns {"model", "step", "passed_over", "precision", "offload", "tasks", "conventions", "cost"},
    where "tasks" is what `run_tasks` finds.

    start: starts ranks, if there are to be more than one.

    Raises:
        ValueError: as `check_tasks`, and for what is wrong with the model or a task's files.
        OSError: data that a task needs cannot be had now.
    """
    _check_values(job)
    if nproc == 1:
        return _run(job, Ranks())
    assert start is not None, "several ranks have to be started"
    return run_on_ranks("pretrain.evaluation.harness_job", asdict(job), nproc, start)


def main() -> None:
    """One of several ranks."""
    rank_main(lambda plain, ranks: _run(TasksJob(**{**plain, "tasks": tuple(plain["tasks"])}), ranks))


def _check_values(job: TasksJob) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--tasks needs lm-eval, which is not installed: pip install 'steppe[harness]'")
    if job.precision not in PRECISIONS:
        raise ValueError(f"precision={job.precision}: an evaluation runs in {' or '.join(PRECISIONS)}")
    for name, value, least in (("num_fewshot", job.num_fewshot, 0), ("limit", job.limit, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if job.samples is not None and Path(job.samples).exists():
        raise ValueError(f"--task-samples {job.samples} exists: name a new folder")


def _run(job: TasksJob, ranks: Ranks) -> dict[str, Any]:
    from pretrain.evaluation.harness import SteppeLM
    from pretrain.evaluation.harness_tasks import find_tasks, load_tasks, run_tasks

    folder = None if job.task_folder is None else Path(job.task_folder)
    tasks = ranks.together(lambda: load_tasks(*find_tasks(job.tasks, folder), job.num_fewshot))
    loaded = ranks.together(lambda: _load(job))
    which = (loaded.step, loaded.fingerprint)
    if any(other != which for other in ranks.gather(which)):  # the run went on meanwhile
        raise ValueError(f"the ranks found different checkpoints of {job.model} to be the newest: choose one by --step")
    began = time.monotonic()
    with _Display(shown=ranks.rank == 0) as display:
        model = SteppeLM(loaded, ranks, job.window, job.add_bos_token, job.batch_tokens, display.update)
        # The first rank alone estimates errors when all is answered, and may fail alone then.
        found = ranks.together(lambda: run_tasks(model, tasks, job.limit, samples=job.samples is not None))
    seconds = time.monotonic() - began
    samples = found.pop("samples", None)
    if job.samples is not None:
        folder = Path(job.samples)
        ranks.together(lambda: _write_samples(folder, samples) if ranks.rank == 0 else None)
    peak_bytes = max(ranks.gather(peak_memory_bytes(loaded.model.device)))
    return {
        "model": loaded.name,
        "step": loaded.step,
        "passed_over": list(loaded.passed_over),
        "precision": job.precision,
        "offload": job.offload,
        "tasks": found,
        "conventions": [*_conventions(found["harness"]), *loaded.notes],
        "cost": {
            "seconds": seconds,
            "tokens_per_second": None,  # much of the time is lm-eval's, and continuations cost more than texts
            "peak_memory_bytes": peak_bytes,
            "ranks": ranks.world,
        },
    }


def _load(job: TasksJob) -> LoadedModel:
    tokenizer = Path(job.tokenizer) if job.tokenizer else None
    return load_model(Path(job.model), job.step, tokenizer, DTYPES[job.precision], job.offload)


def _conventions(harness: dict[str, Any]) -> list[str]:
    start, cut, limit = harness["start_token"].upper(), harness["cut_contexts"], harness["limit"]
    told = [
        f"The tasks and their metrics are those of lm-eval {harness['lm_eval']}.",
        f"What the model is given {'begins with BOS' if harness['add_bos_token'] else 'has no BOS before it'}; where "
        f"nothing comes before what is scored, {start} does.",
        f"The model sees at most {harness['max_length']:,} tokens at once"
        + (f"; {cut:,} contexts were longer, and are cut from the left." if cut else "."),
    ]
    if limit is not None:
        told.append(f"Only the first {limit:,} documents of each task were asked, which is no result to quote.")
    return told


def _write_samples(folder: Path, samples: dict[str, list[Any]]) -> None:
    folder.mkdir(parents=True)
    for task, documents in samples.items():
        lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
        (folder / f"{task.replace('/', '_')}.jsonl").write_text("".join(lines), encoding="utf-8")


class _Display:
    """What is being asked and how much of it is answered, on stderr: a live line on a terminal, else one now and then.

    shown: False on all ranks but one, whose share stands for all.
    """

    def __init__(self, shown: bool) -> None:
        # By name: whatever is printed while tasks run is thrown away.
        self._stderr, self._shown, self._printed = sys.stderr, shown, time.monotonic()
        self._live: Progress | None = None
        if shown and sys.stderr.isatty():
            console = Console(file=sys.stderr)
            self._live = Progress(BarColumn(), TextColumn("{task.description}"), console=console, transient=True)
            self._task = self._live.add_task("tasks", total=1.0)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, what: str, share: float) -> None:
        """Take in which share of the requests for `what` is answered."""
        now = time.monotonic()
        if self._live:
            self._live.update(self._task, completed=share, description=f"{what}: {share:.0%}")
        elif self._shown and now - self._printed >= PLAIN_SECONDS:
            self._printed = now
            print(f"tasks: {what} {share:.0%} done", file=self._stderr, flush=True)


if __name__ == "__main__":
    main()
