"""The header of a safetensors file, for files that are written front to back: what is written need never be in memory
as a whole, as the library's own writer has it."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """A tensor of the file: dtype as safetensors names it (`F32`, `BF16`, `U8`), size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def safetensors_header(entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """What precedes the tensors' bytes, which follow in the order of the entries with nothing between: 8 bytes of
    length, then JSON, padded with spaces so that the tensors are aligned."""
    tensors: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for name, dtype, shape, size_bytes in entries:
        tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size_bytes]}
        start += size_bytes
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
