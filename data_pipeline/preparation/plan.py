"""What a preparation does, decided once before it begins: its files, and how they are parted into units of work.

Units follow from the files' sizes alone, never from who works on them: each becomes shards of its own, so that the data
folder is the same for any number of workers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import xxhash

from data_pipeline.corpus.config import CorpusConfig
from data_pipeline.corpus.document import Rejected
from data_pipeline.corpus.input_config import InputConfig
from data_pipeline.corpus.listing import InputFile, list_files
from data_pipeline.curation.duplicates import DEFAULT_MEMORY_BYTES
from data_pipeline.preparation.memory import available_bytes

DIFFERENCES = {
    "format": "another program",
    "corpus": "other inputs or settings",
    "tokenizer": "another tokenizer",
    "shard_bytes": "another size of shards",
    "packs": "other sequence lengths to pack for",
}
"""What a person calls the parts of a plan that he may have changed."""
PLAN_FORMAT = 1
"""Raised whenever this program would write something else for the same plan."""
LEAST_MEMORY_BYTES = 64 << 20
"""With less, a search for duplicates would be parted into more tasks than are worth it."""
LEAST_UNIT_BYTES = 16 << 20
MOST_UNIT_BYTES = 256 << 20
"""Stored bytes of a unit: compressed, they become about one shard."""
DESIRED_UNITS = 256
"""Into which a corpus is parted where the bounds allow it: enough for many workers to end at about the same time."""


@dataclass(frozen=True)
class PlannedFile:
    """A file, and the number of its input among those of the corpus, or among the evaluation sets."""

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
    evaluation_files: tuple[PlannedFile, ...]
    """Of the sets against which documents are decontaminated."""
    packs: tuple[int, ...] = ()
    """Sequence lengths for which bins are planned at the end."""
    duplicates_memory_bytes: int = DEFAULT_MEMORY_BYTES
    """Of a worker that looks for duplicates. It decides into how many tasks that is parted, not what they find."""

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
        del tree["duplicates_memory_bytes"]
        return xxhash.xxh3_64_hexdigest(json.dumps(tree).encode())

    def to_json(self) -> dict[str, Any]:
        return {
            "format": PLAN_FORMAT,
            "corpus": self.corpus.model_dump(mode="json"),
            "tokenizer": self.tokenizer_fingerprint,
            "shard_bytes": self.shard_bytes,
            "packs": list(self.packs),
            "files": [_file_to_json(planned) for planned in self.files],
            "units": [list(unit) for unit in self.units],
            "hidden_files": list(self.hidden_files),
            "evaluation_files": [_file_to_json(planned) for planned in self.evaluation_files],
            "duplicates_memory_bytes": self.duplicates_memory_bytes,
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        return cls(
            corpus=CorpusConfig.model_validate(tree["corpus"]),
            tokenizer_fingerprint=tree["tokenizer"],
            shard_bytes=tree["shard_bytes"],
            files=tuple(map(_file_from_json, tree["files"])),
            units=tuple((first, end) for first, end in tree["units"]),
            hidden_files=tuple(tree["hidden_files"]),
            evaluation_files=tuple(map(_file_from_json, tree["evaluation_files"])),
            packs=tuple(tree["packs"]),
            duplicates_memory_bytes=tree["duplicates_memory_bytes"],
        )

    def difference(self, other: "Plan") -> str | None:
        """In what two plans differ, in words; None if they do not, but for the memory that they take."""
        ours, theirs = self.to_json(), other.to_json()
        for key, words in DIFFERENCES.items():
            if ours[key] != theirs[key]:
                return words
        if ours | {"duplicates_memory_bytes": 0} == theirs | {"duplicates_memory_bytes": 0}:
            return None
        mine, others = (
            {planned.file.label: planned.file for planned in (*plan.files, *plan.evaluation_files)}
            for plan in (self, other)
        )
        return files_differ(mine, others)


def files_differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """In words, that two lists of files differ, of which each says something by the files' labels."""
    changed = sorted(label for label in one.keys() | other.keys() if one.get(label) != other.get(label))
    if not changed:
        return "another number of hidden files, or another size of units of work"
    more = f", and {len(changed) - 1:,} more" if len(changed) > 1 else ""
    return f"another state of the input files ({changed[0]} is new, gone or changed{more})"


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
    evaluation_sets = enumerate(corpus.curation.evaluation_sets)
    sizes = [planned.file.size for planned in files]
    return Plan(
        corpus=corpus,
        tokenizer_fingerprint=tokenizer_fingerprint,
        shard_bytes=shard_bytes,
        files=tuple(files),
        units=tuple(units_of(sizes, unit_bytes or default_unit_bytes(sizes))),
        hidden_files=tuple(hidden_files),
        evaluation_files=tuple(
            PlannedFile(file, set_) for set_, input_ in evaluation_sets for file in list_files(input_)
        ),
        packs=tuple(sorted(set(packs))),
        duplicates_memory_bytes=min(DEFAULT_MEMORY_BYTES, max(LEAST_MEMORY_BYTES, available_bytes() // 2)),
    )


def _file_to_json(planned: PlannedFile) -> list[Any]:
    return [planned.input, asdict(planned.file)]


def _file_from_json(entry: list[Any]) -> PlannedFile:
    input_, file = entry
    return PlannedFile(InputFile(**file), input_)


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
