"""`steppe data`: a corpus becomes a tokenizer and token shards, which can be verified and looked at."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.commands.data_run import consumed, mix, show_step
from launch.commands.data_tokenizer import train_tokenizer

if TYPE_CHECKING:
    from data_pipeline.manifest import Manifest

SHOWN_CHARACTERS = 2000
SHOWN_TOKENS = 100_000

app = typer.Typer(no_args_is_help=True, help="Prepare, verify and look at training data.", rich_markup_mode=None)
app.command("train-tokenizer")(train_tokenizer)
app.command("mix")(mix)
app.command("consumed")(consumed)

Inputs = Annotated[list[str], typer.Option("--input", help="File, folder or Hugging Face dataset; one or more.")]
# An option takes one value a time, so what follows `--input A` in `--input A B` arrives as arguments.
MoreInputs = Annotated[list[str] | None, typer.Argument(metavar="[PATH]...", help="More inputs.")]
TextField = Annotated[str, typer.Option(help="The field that holds the text of a JSON or parquet row.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command("prepare")
def prepare(
    tokenizer: Annotated[str, typer.Option(help="A sentencepiece model, or a Hugging Face tokenizer.json.")],
    out: Annotated[str, typer.Option(help="The data folder to write.")],
    inputs: Annotated[
        list[str], typer.Option("--input", help="File, folder, URL or Hugging Face dataset; one or more.")
    ] = [],  # noqa: B006
    more_inputs: MoreInputs = None,
    corpus: Annotated[
        Path | None, typer.Option(help="A YAML file of inputs and of what of them is kept, instead of --input.")
    ] = None,
    text_field: TextField = "text",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes and threads; default: one a core.")] = None,
    pack: Annotated[
        list[int], typer.Option(metavar="LENGTH", help="Plan bins of whole documents for this sequence length, too.")
    ] = [],  # noqa: B006
    report: Annotated[
        bool, typer.Option("--report", help="Show what went in, came out and why, and write DIR/report.html.")
    ] = False,
    cluster: Annotated[
        str | None, typer.Option(metavar="PROFILE", help="Queue this command as an array of tasks on a Slurm cluster.")
    ] = None,
    tasks: Annotated[int | None, typer.Option(help="Tasks of the array.")] = None,
    time: Annotated[
        str | None, typer.Option(metavar="HH:MM:SS", help="Time limit of a task [default: the profile's].")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --cluster: print the batch script; write and queue nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read, curate and tokenize a corpus into shards; every document is stored as BOS t1 .. tn EOS.

    Started again after a kill, it goes on where it was; started several times at once, on any machines that see DIR,
    the work is shared.
    """
    from data_pipeline.preparation.job import Request
    from launch.prepare import chosen_corpus, local_folder, prepare_here, queue_preparation

    texts = chosen_corpus(inputs + (more_inputs or []), corpus, text_field)
    request = Request(texts, tokenizer, local_folder(out), packs=tuple(pack))
    if cluster is not None:
        if report:
            raise ValueError("--report does not go with --cluster: give it without, once the array has finished DIR")
        queue_preparation(request, workers, cluster, tasks, time, dry_run, as_json)
        return
    if tasks is not None or time is not None or dry_run:
        raise ValueError("--tasks, --time and --dry-run do not go without --cluster: leave them out")
    manifest = prepare_here(request, workers)
    result = {"path": out, **_summary(manifest), "fingerprint": manifest.fingerprint}
    if report:
        from launch.preparation_report import PreparationReport

        page = PreparationReport.read(request.out)
        result |= page.write() if as_json else page.show()
    _report(result, as_json)


@app.command("verify")
def verify(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A data folder, here or in an object store.")],
    as_json: AsJson = False,
) -> None:
    """Read every byte of a data folder and compare it with the hashes of what was written."""
    from dataclasses import asdict

    from data_pipeline.manifest import Manifest
    from data_pipeline.verify import verify as run
    from launch.byte_progress import ByteProgress

    total_bytes = sum(shard.bin_bytes for shard in Manifest.load(folder).shards)
    with ByteProgress("verifying", total_bytes) as line:
        report = run(folder, lambda done, total: line.reach(done))
    _report({"path": folder, **asdict(report)}, as_json)


@app.command("show")
def show(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A data folder, or a run.")],
    step: Annotated[int | None, typer.Option(help="Of a run: the step whose batch to show, the first being 1.")] = None,
    rank: Annotated[int | None, typer.Option(help="Only what this rank reads.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Of so many [default: as many as trained last].")] = None,
    full_text: Annotated[
        bool, typer.Option("--text", help="The documents' text as it is, rather than its beginning.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What a data folder holds, and the text of its first document. Of a run: the documents that a step reads."""
    if Path(path, "config.yaml").is_file():
        show_step(Path(path), step, rank, ranks, full_text, as_json)
        return
    of_a_run = {"--step": step, "--rank": rank, "--ranks": ranks, "--text": full_text or None}
    for flag in (flag for flag, value in of_a_run.items() if value is not None):
        raise ValueError(f"{path} is no run (it has no config.yaml), and {flag} is of a run: leave it out")
    from tempfile import TemporaryDirectory

    from data_pipeline.config import CacheConfig
    from data_pipeline.documents import Documents
    from data_pipeline.token_source import TokenSource
    from data_pipeline.tokenizer import Tokenizer

    with TemporaryDirectory(prefix="steppe-show-") as scratch:
        source = TokenSource(path, cache=CacheConfig(folder=scratch))
        manifest = source.manifest
        first = next(Documents(source).parts(0, min(manifest.tokens, SHOWN_TOKENS))).tokens
        source.close()
    text = Tokenizer(f"{path}/{manifest.tokenizer_file}").decode(first)
    summary = {"path": path, **_summary(manifest), "fingerprint": manifest.fingerprint, "first_document": text}
    if as_json:
        print(json.dumps(summary))
    else:
        _print_folder(manifest, summary)


def _summary(manifest: "Manifest") -> dict[str, Any]:
    return {
        "shards": len(manifest.shards),
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "text_bytes": manifest.text_bytes,
        "bytes_per_token": round(manifest.text_bytes / manifest.tokens, 4),
        "vocab_size": manifest.vocab_size,
        "dtype": manifest.dtype,
        "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
        "quarantined": manifest.quarantined,
        "skipped_files": manifest.skipped_files,
    }


def _report(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name.replace('_', ' '):>22}  {f'{value:,}' if isinstance(value, int | float) else value}")


def _print_folder(manifest: "Manifest", summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=summary["path"], title_justify="left")
    table.add_column("shard")
    for name in ("documents", "tokens", "bytes"):
        table.add_column(name, justify="right")
    for shard in manifest.shards:
        table.add_row(shard.name, f"{shard.documents:,}", f"{shard.tokens:,}", f"{shard.bin_bytes:,}")
    bin_bytes = sum(shard.bin_bytes for shard in manifest.shards)
    table.add_row("all", *(f"{n:,}" for n in (manifest.documents, manifest.tokens, bin_bytes)))
    console = Console()
    console.print(table)
    first_document = summary.pop("first_document")
    _report(summary, as_json=False)
    console.print("\nfirst document:", style="bold")
    shown = first_document[:SHOWN_CHARACTERS]
    console.print(Text(shown + (" ..." if len(first_document) > len(shown) else "")))
