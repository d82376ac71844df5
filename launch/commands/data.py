"""`steppe data`: a corpus becomes a tokenizer and token shards, which can be verified and looked at."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from data_pipeline.manifest import Manifest

SHOWN_CHARACTERS = 2000

app = typer.Typer(no_args_is_help=True, help="Prepare, verify and look at training data.", rich_markup_mode=None)

Inputs = Annotated[list[str], typer.Option("--input", help="File, folder or Hugging Face dataset; one or more.")]
# An option takes one value a time, so what follows `--input A` in `--input A B` arrives as arguments.
MoreInputs = Annotated[list[str] | None, typer.Argument(metavar="[PATH]...", help="More inputs.")]
TextField = Annotated[str, typer.Option(help="The field that holds the text of a JSON or parquet row.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command("train-tokenizer")
def train_tokenizer(
    inputs: Inputs,
    vocab_size: Annotated[int, typer.Option(min=1, help="Pieces, with 256 bytes and the control pieces.")],
    out: Annotated[Path, typer.Option(help="The model file to write.")],
    more_inputs: MoreInputs = None,
    text_field: TextField = "text",
    as_json: AsJson = False,
) -> None:
    """Train a sentencepiece BPE tokenizer that loses nothing: decode(encode(text)) is text."""
    from data_pipeline.corpus import corpus_bytes, read_documents
    from data_pipeline.tokenizer import train_tokenizer as train
    from launch.byte_progress import ByteProgress

    if out.exists():
        raise ValueError(f"tokenizer {out} exists: choose another --out or remove it")
    paths = inputs + (more_inputs or [])
    rejected = 0

    def count_rejected(record: object) -> None:
        nonlocal rejected
        rejected += 1

    with ByteProgress("reading", corpus_bytes(paths)) as progress:
        documents = read_documents(paths, text_field, count_rejected, progress.advance)
        stats = train(documents, vocab_size, out)
    _report(
        {
            "path": str(out),
            "vocab_size": stats.vocab_size,
            "fingerprint": stats.fingerprint,
            "documents": stats.documents,
            "text_bytes": stats.text_bytes,
            "rejected": rejected,
        },
        as_json,
    )


@app.command("prepare")
def prepare(
    inputs: Inputs,
    tokenizer: Annotated[Path, typer.Option(help="The model file of `train-tokenizer`.")],
    out: Annotated[Path, typer.Option(help="The data folder to write.")],
    more_inputs: MoreInputs = None,
    text_field: TextField = "text",
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that tokenize; default: one a core.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tokenize a corpus into shards; every document is stored as BOS t1 .. tn EOS."""
    from data_pipeline.corpus import corpus_bytes
    from data_pipeline.prepare import prepare as run
    from launch.byte_progress import ByteProgress

    paths = inputs + (more_inputs or [])
    with ByteProgress("preparing", corpus_bytes(paths)) as line:
        manifest = run(paths, tokenizer, out, text_field, workers, lambda progress: line.reach(progress.read_bytes))
    _report({"path": str(out), **_summary(manifest), "fingerprint": manifest.fingerprint}, as_json)


@app.command("verify")
def verify(folder: Annotated[Path, typer.Argument(metavar="DIR")], as_json: AsJson = False) -> None:
    """Read every byte of a data folder and compare it with the hashes of what was written."""
    from dataclasses import asdict

    from data_pipeline.manifest import Manifest
    from data_pipeline.verify import verify as run
    from launch.byte_progress import ByteProgress

    total_bytes = sum(shard.bin_bytes for shard in Manifest.load(folder).shards)
    with ByteProgress("verifying", total_bytes) as line:
        report = run(folder, lambda done, total: line.reach(done))
    _report({"path": str(folder), **asdict(report)}, as_json)


@app.command("show")
def show(folder: Annotated[Path, typer.Argument(metavar="DIR")], as_json: AsJson = False) -> None:
    """What a data folder holds, and the text of its first document."""
    from data_pipeline.config import SourceConfig
    from data_pipeline.manifest import TOKENIZER_NAME
    from data_pipeline.shards import read_index
    from data_pipeline.token_source import TokenSource
    from data_pipeline.tokenizer import Tokenizer

    source = TokenSource(SourceConfig(name="shown", path=str(folder)), sequence_length=1)
    manifest = source.manifest
    lengths, _ = read_index(folder / f"{manifest.shards[0].name}.idx")
    first = source.read_tokens(0, int(lengths[0]))
    source.close()
    text = Tokenizer(folder / TOKENIZER_NAME).decode(first)
    summary = {"path": str(folder), **_summary(manifest), "fingerprint": manifest.fingerprint, "first_document": text}
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
