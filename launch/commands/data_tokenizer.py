"""`steppe data train-tokenizer`: a stated sample of a corpus becomes a tokenizer."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from data_pipeline.sampling import Sample


def train_tokenizer(
    vocab_size: Annotated[int, typer.Option(min=1, help="Pieces, with 256 bytes and the control pieces.")],
    out: Annotated[Path, typer.Option(help="The model file to write.")],
    inputs: Annotated[
        list[str], typer.Option("--input", help="File, folder, URL or Hugging Face dataset; one or more.")
    ] = [],  # noqa: B006
    # An option takes one value a time, so what follows `--input A` in `--input A B` arrives as arguments.
    more_inputs: Annotated[list[str] | None, typer.Argument(metavar="[PATH]...", help="More inputs.")] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="A YAML file of inputs and of their weights in the sample, instead of --input.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="The field that holds the text of a JSON or parquet row.")] = "text",
    sample_bytes: Annotated[
        int, typer.Option(help="Text to train on, shared out by the inputs' weights; memory holds it several times.")
    ] = 1 << 30,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of documents.")] = 0,
    special: Annotated[
        list[str], typer.Option("--special", metavar="TOKEN", help="A further control piece; never read out of a text.")
    ] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Train a sentencepiece BPE tokenizer that loses nothing: decode(encode(text)) is text.

    Every document of an input is as likely in the sample as any other; it says what was seen and what was taken.
    """
    from data_pipeline.corpus.listing import corpus_bytes
    from data_pipeline.sampling import sample_corpus
    from data_pipeline.tokenizer_training import check_special, train_on_samples
    from launch.byte_progress import ByteProgress
    from launch.prepare import chosen_corpus

    if out.exists():
        raise ValueError(f"tokenizer {out} exists: choose another --out or remove it")
    check_special(special)  # before hours of reading
    chosen = chosen_corpus(inputs + (more_inputs or []), corpus, text_field)
    rejected = 0

    def count_rejected(record: object) -> None:
        nonlocal rejected
        rejected += 1

    with ByteProgress("reading", corpus_bytes(chosen)) as progress:
        samples = sample_corpus(chosen, sample_bytes, seed, count_rejected, progress.advance)
    stats = train_on_samples(samples, vocab_size, out, special)
    result = {
        "path": str(out),
        "vocab_size": stats.vocab_size,
        "fingerprint": stats.fingerprint,
        "documents": stats.documents,
        "text_bytes": stats.text_bytes,
        "rejected": rejected,
        "seed": seed,
        "special": special,
        "inputs": [_summary(sample) for sample in samples],
    }
    if as_json:
        print(json.dumps(result))
    else:
        _print(result)


def _summary(sample: "Sample") -> dict[str, Any]:
    return {
        "name": sample.name,
        "documents": len(sample.documents),
        "text_bytes": sample.text_bytes,
        "seen_documents": sample.seen_documents,
        "seen_bytes": sample.seen_bytes,
    }


def _print(result: dict[str, Any]) -> None:
    print(f"{result['path']}: {result['vocab_size']:,} pieces, fingerprint {result['fingerprint']}")
    if result["special"]:
        print(f"special tokens, from id 3 on: {' '.join(result['special'])}")
    print(
        f"trained on {result['documents']:,} documents, {result['text_bytes']:,} bytes (seed {result['seed']}); "
        f"{result['rejected']:,} records were no documents"
    )
    for each in result["inputs"]:
        print(
            f"  {each['name']}: {each['documents']:,} of {each['seen_documents']:,} documents, "
            f"{each['text_bytes']:,} of {each['seen_bytes']:,} bytes"
        )
