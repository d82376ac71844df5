"""Corpora in files and what is read from them, for the tests beside this file."""

import json
from pathlib import Path
from typing import Any

from data_pipeline.corpus.config import InputConfig, corpus_of
from data_pipeline.corpus.document import Document, Rejected
from data_pipeline.corpus.listing import InputFile, list_files
from data_pipeline.corpus.reading import read_documents, read_file

TEXTS = ["one\n", "  zwei  ", "三 🎈", "four\r\n\tfive"]


def as_lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


def read(*paths: Path | str, text_field: str = "text") -> tuple[list[Document], list[Rejected]]:
    rejected: list[Rejected] = []
    return list(read_documents(corpus_of(paths, text_field), rejected.append)), rejected


def only_file(path: Path | str, **words: Any) -> tuple[InputFile, InputConfig]:
    """The one file of an input that is described in YAML's words, to be read by `read_file`."""
    input_ = InputConfig.model_validate({"path": str(path), **words})
    (file,) = list_files(input_)
    return file, input_


def texts_of(path: Path | str, **words: Any) -> list[str]:
    return [document.text for document in read_file(*only_file(path, **words))]
