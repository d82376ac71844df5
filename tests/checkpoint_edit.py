"""Changing what an index says, and its hash with it: what only its author, or a fault of ours, could have done."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash


def edit_index(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply `change` to the parsed index, in place, and seal it again."""
    path = checkpoint / "index.json"
    index = json.loads(path.read_text())["index"]
    change(index)
    body = json.dumps(index)
    path.write_text(f'{{"xxh3": "{xxhash.xxh3_64_hexdigest(body.encode())}", "index": {body}}}')
