"""Where each document of a data folder came from: its file and its number in it.

NAME.origin    beside each shard, one ORIGIN_DTYPE a document, in the order of the shard's documents
origins.json   the files of the corpus in the order in which they were read; `file` counts in it
"""

import json
from dataclasses import dataclass

import numpy as np

ORIGINS_NAME = "origins.json"
ORIGIN_DTYPE = np.dtype([("index", "<u8"), ("file", "<u4"), ("text_bytes", "<u4")])
"""16 bytes a document: its number in its file from 0, the number of the file, and the UTF-8 bytes of its text."""
MAX_TEXT_BYTES = (1 << 31) - 3
"""A byte may be a token, to which BOS and EOS come, and shards count the tokens of a document in int32."""


@dataclass(frozen=True)
class OriginFile:
    """A file of the corpus, and the name of the input that it belongs to."""

    path: str
    input: str


def serialized_origins(files: list[OriginFile]) -> bytes:
    """The content of `origins.json`."""
    rows = [{"path": file.path, "input": file.input} for file in files]
    return (json.dumps({"files": rows}, indent=0) + "\n").encode()


def parse_origin_files(content: bytes, name: str) -> list[OriginFile]:
    """The corpus's files out of an `origins.json`; errors call it `name`.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return [OriginFile(**row) for row in json.loads(content)["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} is damaged ({error}): copy it again or run `steppe data prepare` again") from None
