"""What every format is first read as: a text with the fields beside it, at its place in the file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from data_pipeline.corpus.document import Rejected


@dataclass(frozen=True, slots=True)
class Record:
    """A text, its place in the file (`Document.index`), and the fields that conditions may be put on."""

    text: str
    index: int
    fields: Mapping[str, Any]


Records: TypeAlias = Iterator[Record | Rejected]


def field_of(fields: Mapping[str, Any], name: str) -> Any:
    """A field by its name, or `meta.language` inside another field; None if there is none."""
    if name in fields:
        return fields[name]
    outer, dot, inner = name.partition(".")
    inside = fields.get(outer) if dot else None
    return field_of(inside, inner) if isinstance(inside, Mapping) else None
