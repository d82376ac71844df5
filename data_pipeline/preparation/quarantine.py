"""Broken records, kept aside for their owner."""

import base64
import json
import os
from pathlib import Path
from typing import BinaryIO, Self

from data_pipeline.corpus.document import Rejected

OWNER_ONLY = 0o600
"""Of files with raw text, of which nothing is known, or with URLs that are signed."""


class Quarantine:
    """Keeps broken records, one JSON object a line: path, line, reason, raw (base64). No record, no file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, rejected: Rejected) -> None:
        """Keep a record; a file that was passed over is still where it was."""
        if rejected.raw is None:
            return
        if self._file is None:
            self._file = os.fdopen(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, OWNER_ONLY), "wb")
        raw = base64.b64encode(rejected.raw).decode()
        record = {"path": rejected.path, "line": rejected.line, "reason": rejected.reason, "raw": raw}
        self._file.write((json.dumps(record) + "\n").encode())


def join_quarantines(parts: list[Path], path: Path) -> None:
    """Put those of `parts` that are there into one file, in their order; no part, no file."""
    parts = [part for part in parts if part.exists()]
    if not parts:
        return
    temporary = path.with_name(path.name + ".tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, OWNER_ONLY), "wb") as file:
        for part in parts:
            file.write(part.read_bytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
