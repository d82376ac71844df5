"""What a reader of a corpus hands out: documents, and word of everything that is none."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its text, the file or hub dataset it came from, and its place there."""

    text: str
    source: str
    index: int
    """Line of a text file, row of a table (of a shard, for a hub dataset), record of an archive, each from 0."""
    group: str | None = None
    """What the documents were asked to be grouped by, if they were."""


@dataclass(frozen=True, slots=True)
class Grouping:
    """What a document's group is: the first folder below its input, or a field of its record; or it has none."""

    by_folder: bool = False
    by_field: str | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that is no document."""

    path: str
    line: int
    """Line of a text file, row of a table or record of an archive, from 1; 0 for a whole file."""
    reason: str
    """Never quotes the record."""
    raw: bytes | None
    """What stood there. None for a file that was passed over: it is still where it was."""


OnBad = Callable[[Rejected], None]
OnBytes = Callable[[int], None]
OnLeftOut = Callable[[int], None]


def ignore(event: object) -> None:
    """For whom it is nothing to know."""
