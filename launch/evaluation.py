"""What `steppe eval` does once its words are checked: texts are surveyed and scored, compared, and benchmarks run."""

import hashlib
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.byte_progress import ByteProgress
from launch.ranks import run_ranks

if TYPE_CHECKING:
    from pretrain.evaluation.harness_job import TasksJob
    from pretrain.evaluation.job import EvaluationJob
    from pretrain.evaluation.texts import Survey

COMPARED_NAME = "compared"
"""Folder inside an evaluation's own, of the models that it was compared with."""


@dataclass(frozen=True)
class Other:
    """What an evaluation is compared with: a model and its step, or the folder that an earlier evaluation left."""

    path: Path
    step: int | Literal["best"] | None = None

    @property
    def is_evaluation(self) -> bool:
        from pretrain.evaluation.folder import REQUEST_NAME

        return (self.path / REQUEST_NAME).is_file()

    def check(self) -> None:
        """Raise ValueError, before anything is scored, if it is neither."""
        from pretrain.evaluation.folder import read_facts

        if not self.is_evaluation:
            check_model(self.path, self.step, "--compare-step")
            return
        if self.step is not None:
            raise ValueError(f"--compare-step {self.step}: {self.path} is an evaluation, which has its step already")
        read_facts(self.path)

    def check_domains(self, domains: Collection[str]) -> None:
        """Raise ValueError, before anything is scored, for an evaluation of other domains than these."""
        from pretrain.evaluation.folder import read_facts

        if self.is_evaluation and (differing := {*read_facts(self.path).domains} ^ {*domains}):
            name = min(differing)
            which = "holds no domain" if name in domains else "also holds the domain"
            raise ValueError(f"--compare {self.path} {which} {name}: name the same texts, grouped alike")


def check_model(path: Path, step: int | Literal["best"] | None, option: str = "--step") -> None:
    """Raise ValueError if there is no model, or not that step of it. Reads no weights. option: that named the step."""
    from pretrain.choose_checkpoint import checkpoint_of

    if (path / "config.json").is_file() and step is None:
        return
    try:
        checkpoint_of(path, step, [])
    except ValueError as error:
        raise ValueError(str(error).replace("--step ", f"{option} ")) from None


@contextmanager
def evaluated(
    job: "EvaluationJob", nproc: int, out: Path | None, other: Other | None
) -> Iterator[tuple[dict[str, Any], Path]]:
    """The result of a job, and the folder with its documents' scores, which is gone afterwards unless it is `out`.

    Goes on with what `out` holds. Raises what `evaluate_job` and `result` do.
    """
    from pretrain.evaluation.folder import is_finished
    from pretrain.evaluation.job import evaluate_job
    from pretrain.evaluation.result import result

    with _kept_or_not(out) as folder:
        if not is_finished(folder):
            found = _surveyed(job)
            if found is not None:
                job = replace(job, total_bytes=found.bytes)
                if other is not None:
                    other.check_domains(found.domains)
        facts = evaluate_job(job, folder, nproc, run_ranks)
        against: Path | None = None
        if other is not None and other.is_evaluation:
            against = other.path
        elif other is not None:
            against = folder / COMPARED_NAME / _name_of(other)
            alike = replace(job, window=facts.window, stride=facts.stride, tokenizer=None)
            evaluate_job(replace(alike, model=str(other.path), step=other.step), against, nproc, run_ranks)
        yield result(folder, against), folder


def with_tasks(result: dict[str, Any] | None, job: "TasksJob", nproc: int) -> dict[str, Any]:
    """The result with what benchmarks say of the model that it is of; or of benchmarks alone. Raises what
    `run_tasks_job` does."""
    from pretrain.evaluation.harness_job import run_tasks_job
    from pretrain.run_dir import RunDir

    if result is None:
        return run_tasks_job(job, nproc, run_ranks)
    if RunDir(Path(job.model)).config_path.is_file():  # which may have gone on meanwhile
        job = replace(job, step=result["step"])
    found = run_tasks_job(job, nproc, run_ranks)
    known = result["conventions"]
    told = [sentence for sentence in found["conventions"] if sentence not in known]
    return {**result, "tasks": found["tasks"], "conventions": [*known, *told]}


@contextmanager
def _kept_or_not(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="steppe-eval-") as scratch:
        yield Path(scratch) / "evaluation"


def _surveyed(job: "EvaluationJob") -> "Survey | None":
    """How much text there is, if it is local; what is broken or empty shows here, before the model runs."""
    from pretrain.evaluation.texts import survey, survey_bytes

    with ByteProgress("survey", survey_bytes(job.texts)) as progress:
        return survey(job.texts, progress.advance)


def _name_of(other: Other) -> str:
    """A folder's name that two models do not share."""
    about = f"{other.path.resolve()} {other.step}"
    return f"{other.path.resolve().name}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"
