"""What a preparation does, decided once before it begins: its files, and how they are parted into units of work.

Units follow from the files' sizes alone, never from who works on them: each becomes shards of its own, so that the data
folder is the same for any number of workers.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import xxhash

from data_pipeline.corpus.config import CorpusConfig, InputConfig, corpus_of
from data_pipeline.corpus.document import Rejected
from data_pipeline.corpus.listing import InputFile, list_files

PLAN_FORMAT = 1
"""Raised whenever this program would write something else for the same plan."""
LEAST_UNIT_BYTES = 16 << 20
MOST_UNIT_BYTES = 256 << 20
"""Stored bytes of a unit: compressed, they become about one shard."""
DESIRED_UNITS = 256
"""Into which a corpus is parted where the bounds allow it: enough for many workers to end at about the same time."""


@dataclass(frozen=True)
class PlannedFile:
    """A file of the corpus, and the number of its input."""

    file: InputFile
    input: int


@dataclass(frozen=True)
class Plan:
    """Everything that the content of a data folder follows from."""

    corpus: CorpusConfig
    tokenizer_fingerprint: str
    shard_bytes: int
    files: tuple[PlannedFile, ...]
    units: tuple[tuple[int, int], ...]
    """Each a range [first, end) of the files."""
    hidden_files: tuple[int, ...]
    """By input: files that are not listed, since they are hidden."""
    evaluation_files: tuple[InputFile, ...]
    """Of the sets against which documents are decontaminated."""
    packs: tuple[int, ...] = ()
    """Sequence lengths for which bins are planned at the end."""

    def input_of(self, file: PlannedFile) -> InputConfig:
        return self.corpus.inputs[file.input]

    def unit_files(self, unit: int) -> list[tuple[int, PlannedFile]]:
        """The files of a unit, each with its number in the corpus."""
        first, end = self.units[unit]
        return list(zip(range(first, end), self.files[first:end], strict=True))

    def unit_bytes(self, unit: int) -> int | None:
        """Stored bytes of a unit; None where a server or a hub dataset does not say."""
        return total_bytes([planned.file for _, planned in self.unit_files(unit)])

    @property
    def fingerprint(self) -> str:
        """xxh3-64 of all that the shards follow from, in hexadecimal; packing comes after them."""
        tree = self.to_json() | {"packs": []}
        return xxhash.xxh3_64_hexdigest(json.dumps(tree).encode())

    def to_json(self) -> dict[str, Any]:
        return {
            "format": PLAN_FORMAT,
            "corpus": self.corpus.model_dump(mode="json"),
            "tokenizer": self.tokenizer_fingerprint,
            "shard_bytes": self.shard_bytes,
            "packs": list(self.packs),
            "files": [[planned.input, asdict(planned.file)] for planned in self.files],
            "units": [list(unit) for unit in self.units],
            "hidden_files": list(self.hidden_files),
            "evaluation_files": [asdict(file) for file in self.evaluation_files],
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        return cls(
            corpus=CorpusConfig.model_validate(tree["corpus"]),
            tokenizer_fingerprint=tree["tokenizer"],
            shard_bytes=tree["shard_bytes"],
            files=tuple(PlannedFile(InputFile(**file), input_) for input_, file in tree["files"]),
            units=tuple((first, end) for first, end in tree["units"]),
            hidden_files=tuple(tree["hidden_files"]),
            evaluation_files=tuple(InputFile(**file) for file in tree["evaluation_files"]),
            packs=tuple(tree["packs"]),
        )

    def difference(self, other: "Plan") -> str | None:
        """In what two plans differ, in words; None if they do not."""
        ours, theirs = self.to_json(), other.to_json()
        kinds = {
            "format": "program",
            "corpus": "inputs or settings",
            "tokenizer": "tokenizer",
            "shard_bytes": "size of shards",
            "packs": "sequence lengths to pack for",
        }
        for key, words in kinds.items():
            if ours[key] != theirs[key]:
                return f"another {words}" if key in ("format", "tokenizer", "shard_bytes") else f"other {words}"
        mine, others = ({planned.file.path: planned.file for planned in plan.files} for plan in (self, other))
        for path in sorted(mine.keys() | others.keys()):
            if mine.get(path) != others.get(path):
                return f"another state of the input files ({path} is new, gone or changed)"
        return None if ours == theirs else "another state of the input files"


def make_plan(
    corpus: CorpusConfig,
    tokenizer_fingerprint: str,
    shard_bytes: int,
    packs: Sequence[int] = (),
    unit_bytes: int | None = None,
) -> Plan:
    """List the corpus's files and part them into units of about `unit_bytes`; by default, what suits their sizes.

    Raises:
        ValueError: an input does not exist or holds no file.
        OSError: a store did not answer.
    """
    files: list[PlannedFile] = []
    hidden_files = []
    for number, input_ in enumerate(corpus.inputs):
        hidden: list[Rejected] = []
        files += [PlannedFile(file, number) for file in list_files(input_, hidden.append)]
        hidden_files.append(len(hidden))
    evaluation = evaluation_corpus(corpus)
    sizes = [planned.file.size for planned in files]
    return Plan(
        corpus=corpus,
        tokenizer_fingerprint=tokenizer_fingerprint,
        shard_bytes=shard_bytes,
        files=tuple(files),
        units=tuple(units_of(sizes, unit_bytes or default_unit_bytes(sizes))),
        hidden_files=tuple(hidden_files),
        evaluation_files=() if evaluation is None else tuple(_all_files(evaluation)),
        packs=tuple(sorted(set(packs))),
    )


def evaluation_corpus(corpus: CorpusConfig) -> CorpusConfig | None:
    """The evaluation sets against which a corpus is decontaminated, as a corpus of their own; None if it is not."""
    decontaminate = corpus.curation.decontaminate
    return None if decontaminate is None else corpus_of(decontaminate.against)


def _all_files(corpus: CorpusConfig) -> Iterator[InputFile]:
    for input_ in corpus.inputs:
        yield from list_files(input_)


def default_unit_bytes(sizes: Sequence[int | None]) -> int:
    """Large enough that shards are, small enough that workers end together."""
    known = sum(size for size in sizes if size is not None)
    return min(max(known // DESIRED_UNITS, LEAST_UNIT_BYTES), MOST_UNIT_BYTES)


def units_of(sizes: Sequence[int | None], unit_bytes: int) -> list[tuple[int, int]]:
    """Ranges [first, end) of consecutive files of at most `unit_bytes` together, or of one larger file.

    A file of unknown size (None) is a unit.
    """
    units: list[tuple[int, int]] = []
    first = inside = 0
    for number, size in enumerate(sizes):
        if number > first and (size is None or sizes[first] is None or inside + size > unit_bytes):
            units.append((first, number))
            first, inside = number, 0
        inside += size or 0
    return [*units, (first, len(sizes))] if sizes else []


def total_bytes(files: Sequence[InputFile]) -> int | None:
    """Stored bytes of all; None where one of them is not known."""
    sizes = [file.size for file in files if file.size is not None]
    return sum(sizes) if len(sizes) == len(files) else None
