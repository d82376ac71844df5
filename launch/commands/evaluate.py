"""`steppe eval`: the perplexity of a model on documents."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def evaluate(
    model: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a Hugging Face folder.")],
    data: Annotated[list[str], typer.Option(help="PATH or NAME=PATH of a corpus, each a domain; one or more.")],
    more_data: Annotated[list[str] | None, typer.Argument(metavar="[PATH]...", help="More of --data.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens the model sees at once; default: as in training.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between two windows; default: the window.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one forward pass; never changes a result.")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks to share the documents.")] = 1,
    step: Annotated[int | None, typer.Option(help="A run's checkpoint of this step; default: the newest.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="The model's own, if not beside it.")] = None,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of weights and forward pass.")] = "fp32",
    text_field: Annotated[str, typer.Option(help="The field that holds the text of a JSON or parquet row.")] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Perplexity and bits per byte, by document: each token and EOS is scored exactly once, given BOS."""
    from launch.ranks import run_ranks
    from pretrain.device import check_device
    from pretrain.evaluation.job import EvaluationJob, parse_domains, run_job, run_job_on_ranks, survey

    domains = parse_domains([*data, *(more_data or [])])
    job = EvaluationJob(
        model=str(model),
        data=domains,
        window=window,
        stride=stride,
        batch_tokens=batch_tokens,
        step=step,
        tokenizer=str(tokenizer) if tokenizer else None,
        precision=precision,
        text_field=text_field,
        total_bytes=survey(domains, text_field),
    )
    check_device(nproc, precision)
    result = run_job(job) if nproc == 1 else run_job_on_ranks(job, nproc, run_ranks)
    for reason in result["passed_over"]:
        print(f"steppe: passed over: {reason}", file=sys.stderr)
    if as_json:
        print(json.dumps(result))
    else:
        _print_table(result)


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    at_step = "" if result["step"] is None else f" at step {result['step']}"
    table = Table(title=f"{result['model']}{at_step}", title_justify="left")
    table.add_column("domain")
    for name in ("loss", "perplexity", "bits per byte", "tokens", "bytes", "documents"):
        table.add_column(name, justify="right")
    rows = dict(result["by_domain"])
    if len(rows) > 1:
        rows["all"] = result
    for name, score in rows.items():
        table.add_row(
            name,
            f"{score['loss']:.4f}",
            f"{score['perplexity']:.3f}",
            f"{score['bits_per_byte']:.4f}",
            f"{score['tokens']:,}",
            f"{score['bytes']:,}",
            f"{score['documents']:,}",
        )
    start = "BOS" if result["start_token"] == "bos" else "EOS, for the tokenizer has no BOS"
    eos = "EOS is scored" if result["eos_scored"] else "no EOS is scored, for the tokenizer has none"
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        f"window {result['window']}, stride {result['stride']}, {result['precision']}; a document starts from {start}; "
        f"{eos}",
        highlight=False,
    )
