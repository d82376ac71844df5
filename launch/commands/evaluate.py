"""`steppe eval`: the perplexity of a model on documents, and what benchmarks say of it."""

import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from launch.out_files import check_out_files, encodable, write_out_file
from launch.step_word import HELP as STEP_HELP
from launch.step_word import step_of_word

if TYPE_CHECKING:
    from launch.evaluation import Other
    from pretrain.evaluation.harness_job import TasksJob
    from pretrain.evaluation.job import EvaluationJob

PLAIN_WIDTH = 120
"""Columns of what is printed elsewhere than at a terminal."""


def evaluate(
    model: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a Hugging Face folder.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="PATH or NAME=PATH of texts, each a domain: files, folders, URLs, hub names, data folders."),
    ] = None,
    more_data: Annotated[list[str] | None, typer.Argument(metavar="PATH", help="More of --data.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="A YAML of inputs, as of `steppe data prepare`.")] = None,
    text_field: Annotated[str, typer.Option(help="The field that holds the text of a JSON or parquet row.")] = "text",
    by_folder: Annotated[bool, typer.Option("--by-folder", help="A folder just below an input is a domain.")] = False,
    by_field: Annotated[str | None, typer.Option(help="The value of this field of a record is its domain.")] = None,
    window: Annotated[
        str | None, typer.Option(help="Tokens the model sees at once, or `document`; default: as in training.")
    ] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens between two windows; default: the window.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one forward pass; changes a result by rounding only.")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks to share the documents.")] = 1,
    step: Annotated[str | None, typer.Option(help=STEP_HELP)] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="The model's own, if not beside it.")] = None,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of weights and forward pass.")] = "fp32",
    offload: Annotated[
        Literal["cpu", "disk"] | None, typer.Option(help="Where weights are that do not compute just now.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Another model, or the --out of its evaluation: differences, with intervals.")
    ] = None,
    compare_step: Annotated[str | None, typer.Option(help="As --step, of the model to compare with.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Benchmarks by name or pattern, with commas between; needs lm-eval.")
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="A folder of tasks' YAML files, beside lm-eval's.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in a benchmark's prompt.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many documents of each benchmark.")] = None,
    task_samples: Annotated[
        Path | None, typer.Option(help="A new folder for what each benchmark asked and was answered, a file each.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Keep each document's score here; the same command goes on after a stop.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write a row a domain to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots to this file.")] = None,
) -> None:
    """Perplexity and bits per byte, by document: each token and EOS is scored exactly once, given BOS."""
    step_, compare_step_ = step_of_word(step), step_of_word(compare_step, "--compare-step")
    window_ = _window_of_word(window)
    named = [*(data or []), *(more_data or [])]
    has_texts = bool(named) or corpus is not None or tasks is None
    _check_words(
        ("--compare", compare is None, {"--compare-step": compare_step}),
        ("--tasks", tasks is None, {"--task-folder": task_folder, "--num-fewshot": num_fewshot, "--limit": limit}),
        ("--tasks", tasks is None, {"--task-samples": task_samples}),
        ("--data", not has_texts, {"--compare": compare, "--out": out, "--csv": csv, "--stride": stride}),
        ("--data", not has_texts, {"--by-folder": by_folder or None, "--by-field": by_field}),
        ("--data", not has_texts, {"--window": window if window_ == "document" else None}),
        ("--data", not has_texts, {"--text-field": None if text_field == "text" else text_field}),
    )
    check_out_files({"--csv": csv, "--html": html})

    from launch.evaluation import Other, check_model
    from pretrain.device import check_device
    from pretrain.evaluation.harness_job import TasksJob, check_tasks
    from pretrain.evaluation.job import EvaluationJob
    from pretrain.evaluation.texts import texts_config

    asked: dict[str, Any] = {
        "model": str(model),
        "batch_tokens": batch_tokens,
        "step": step_,
        "tokenizer": str(tokenizer) if tokenizer else None,
        "precision": precision,
        "offload": offload,
    }
    check_device(nproc, precision)
    check_model(model, step_)
    job: EvaluationJob | None = None
    if has_texts:
        texts = texts_config(named, corpus, text_field, by_folder, by_field)
        job = EvaluationJob(texts=texts, window=window_, stride=stride, **asked)
    tasks_job: TasksJob | None = None
    if tasks is not None:
        tasks_job = TasksJob(
            tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
            task_folder=str(task_folder) if task_folder else None,
            num_fewshot=num_fewshot,
            limit=limit,
            window=window_ if isinstance(window_, int) else None,
            samples=str(task_samples) if task_samples else None,
            **asked,
        )
        check_tasks(tasks_job)
    other = None if compare is None else Other(compare, compare_step_)
    if other is not None:
        other.check()
    _print(_run(job, tasks_job, other, nproc, _Files(out, csv, html)), as_json)


@dataclass(frozen=True)
class _Files:
    """What an evaluation leaves: the folder of its documents' scores, a table, and a page."""

    out: Path | None
    csv: Path | None
    html: Path | None


def _run(
    job: "EvaluationJob | None", tasks_job: "TasksJob | None", other: "Other | None", nproc: int, files: _Files
) -> dict[str, Any]:
    """The result of one job or of both, with its files written. Raises typer.Exit if it is asked to stop."""
    from launch.evaluation import evaluated, with_tasks
    from launch.ranks import StoppedError

    with ExitStack() as stack:
        result, folder = None, None
        try:
            if job is not None:
                result, folder = stack.enter_context(evaluated(job, nproc, files.out, other))
            if tasks_job is not None:
                result = with_tasks(result, tasks_job, nproc)
        except (KeyboardInterrupt, StoppedError):
            raise typer.Exit(_stopped(files.out, job is not None)) from None
        assert result is not None
        _write(result, folder, files)
    return result


def _print(result: Mapping[str, Any], as_json: bool) -> None:
    for reason in result["passed_over"]:
        print(f"steppe: passed over: {reason}", file=sys.stderr)
    if as_json:
        print(json.dumps(result, allow_nan=False))
        return
    from rich.console import Console

    from launch.evaluation_table import show

    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    with console.capture() as shown:
        show(result, console)
    sys.stdout.write(encodable(shown.get(), sys.stdout.encoding))


def _window_of_word(word: str | None) -> int | Literal["document"] | None:
    if word is None or word == "document":
        return word  # type: ignore[return-value]
    if not (word.isascii() and word.isdecimal()):
        raise ValueError(f"--window {word} must be a number of tokens, or document for all of a document at once")
    return int(word)


def _check_words(*rules: tuple[str, bool, dict[str, Any]]) -> None:
    """(an option, whether it is missing, those that mean nothing without it). Raises ValueError for one of those."""
    for needed, is_missing, options in rules:
        for option, value in options.items():
            if is_missing and value is not None:
                said = option if value is True else f"{option} {value}"
                raise ValueError(f"{said} means nothing without {needed}: add it, or leave {option} out")


def _write(result: dict[str, Any], folder: Path | None, files: _Files) -> None:
    from launch.evaluation_csv import csv_text
    from pretrain.evaluation.record import read_scores

    if files.csv is not None:
        write_out_file(files.csv, csv_text(result))
    if files.html is not None:
        from launch.evaluation_report import evaluation_page

        write_out_file(files.html, evaluation_page(result, [] if folder is None else read_scores(folder)))


def _stopped(out: Path | None, has_texts: bool) -> int:
    """Say what is left of an evaluation that was asked to stop; returns the exit code."""
    from pretrain.outcome import EXIT_FAILED, EXIT_STOPPED

    kept = "nothing is kept" + (": with --out FOLDER it would be" if has_texts else "")
    if out is not None:
        kept = f"what is scored is kept in {out}, and the same command goes on"
    print(f"steppe: stopped; {kept}", file=sys.stderr)
    return EXIT_FAILED if out is None else EXIT_STOPPED
