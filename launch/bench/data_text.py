"""The text that `steppe bench data --part prepare` works on: the same files and the same tokenizer for everybody."""

import gzip
import itertools
import json
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.corpus.config import corpus_of
from data_pipeline.corpus.reading import read_documents
from data_pipeline.preparation.encoding import utf8_bytes
from data_pipeline.tokenizer_training import train_tokenizer
from launch.demo import library_sources

TRAINING_BYTES = 16 << 20
"""About so much of the text a tokenizer is trained on, which takes seconds."""
COMPRESSION = 6
"""gzip's own default."""


@dataclass(frozen=True)
class Text:
    """Documents in files `{"text": ...}` a line, gzip."""

    what: str
    files: tuple[Path, ...]
    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents."""
    copies: int
    """How often each document is there."""


def read_texts(inputs: Sequence[str]) -> tuple[str, list[str]]:
    """What the text is, in words, and its documents: of inputs, or where there are none, Python's own sources.

    Without those of white space alone, which some pipelines pass over.

    Raises:
        ValueError: an input does not exist, or holds no document.
    """
    if inputs:
        documents = read_documents(corpus_of(inputs))
        return ", ".join(inputs), [document.text for document in documents if document.text.strip()]
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = library_sources(library)
    if not sources:
        raise ValueError(f"{library} holds no standard library sources: name a text by --input")
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sources]
    return f"the sources of {library.name}'s standard library", [text for text in texts if text.strip()]


def write_text(what: str, texts: Sequence[str], folder: Path, files: int, least_bytes: int) -> Text:
    """Write documents in turn into so many files, all of them so often that there are about `least_bytes`."""
    once = sum(map(utf8_bytes, texts))
    copies = max(1, round(least_bytes / once))
    folder.mkdir()
    paths = tuple(folder / f"part_{number:04d}.jsonl.gz" for number in range(files))
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts]
    for number, path in enumerate(paths):
        mine = itertools.islice(itertools.chain.from_iterable(itertools.repeat(lines, copies)), number, None, files)
        path.write_bytes(gzip.compress(b"".join(mine), COMPRESSION))
    return Text(what, paths, copies * len(texts), copies * once, copies)


def train(texts: Sequence[str], vocab_size: int, out: Path) -> None:
    """Train a sentencepiece model on some of the documents. Raises ValueError for a vocabulary that does not fit."""
    step = max(1, sum(map(utf8_bytes, texts)) // TRAINING_BYTES)
    train_tokenizer(texts[::step], vocab_size, out)
