"""Changing the files of a checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash


def edit_index(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply `change` to the parsed index, in place, and seal it again: what only its author, or a fault of ours, could
    have done."""
    path = checkpoint / "index.json"
    index = json.loads(path.read_text())["index"]
    change(index)
    body = json.dumps(index)
    path.write_text(f'{{"xxh3": "{xxhash.xxh3_64_hexdigest(body.encode())}", "index": {body}}}')


def flip_bit(path: Path, at: int, bit: int = 0) -> None:
    """Change one bit of a file, in place."""
    with open(path, "rb+") as file:
        file.seek(at, 0 if at >= 0 else 2)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1 << bit]))
