"""Which texts a corpus is made of, in words: files, folders, object stores, hub datasets. No numpy, no files opened.

inputs:
  - {path: s3://crawl/2024-10/*.warc.gz, name: web}
  - {path: papers/, text_field: body, where: {language: en, score: {min: 0.5}}, weight: 2}
  - {path: owner/name, subset: science, split: train}
curation: {gopher: true, exact_duplicates: true}
"""

import difflib
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_pipeline.corpus.formats import Format, split_compression
from data_pipeline.curation.config import CurationConfig

Scalar = str | bool | int | float | None


class ConditionConfig(BaseModel):
    """What a field of a record must be. Bounds are inclusive, and compare numbers with numbers, texts with texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)

    one_of: tuple[Scalar, ...] | None = Field(default=None, alias="in")
    min: float | str | None = None
    max: float | str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_scalar(cls, value: Any) -> Any:
        return value if isinstance(value, Mapping | ConditionConfig) else {"in": [value]}

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if self.one_of is None and self.min is None and self.max is None:
            raise ValueError("a condition that asks nothing: give a value, {in: [...]}, {min: ...} or {max: ...}")
        return self

    def holds(self, value: Any) -> bool:
        """Whether a field's value passes; a field that is missing is None, and passes only where `in` has null."""
        if isinstance(value, date):
            value = value.isoformat()
        if self.one_of is not None and value not in self.one_of:
            return False
        return (self.min is None or (_comparable(value, self.min) and value >= self.min)) and (
            self.max is None or (_comparable(value, self.max) and value <= self.max)
        )


def _comparable(value: Any, bound: float | str) -> bool:
    return isinstance(value, str) if isinstance(bound, str) else isinstance(value, int | float)


class InputConfig(BaseModel):
    """One source of text, and which of its records are documents."""

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)

    path: str = Field(min_length=1)
    """A file, a folder, a pattern (`*`, `?`, `[...]`, `**`), a URL (s3://, gs://, https://), or `owner/name` of a
    dataset on the hub. An https:// URL is one file."""
    name: str = ""
    """What the input is called in reports; by default its file's or folder's name without suffixes."""
    format: Literal["auto", Format] = "auto"
    """auto: by each file's name (see `formats.format_of`). Any other format holds for every file of the input."""
    text_field: str = Field(default="text", min_length=1)
    """Of a JSON object or a table's row; `meta.text` is a field inside another."""
    where: dict[str, ConditionConfig] = {}
    """Conditions on other fields, all of which a record must meet: a value, {in: [...]}, {min: ..., max: ...}.
    The fields of an archive's records are their WARC headers."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Share in the sample that a tokenizer is trained on, relative to the other inputs' weights."""
    subset: str | None = None
    """Of a hub dataset, which calls it a configuration."""
    split: str = "train"
    """Of a hub dataset."""
    revision: str | None = None
    """Of a hub dataset: a commit, branch or tag."""

    @model_validator(mode="after")
    def _asks_for_what_there_is(self) -> Self:
        if self.where and self.format in ("text", "lines"):
            raise ValueError(f"where: format {self.format} has no fields to put conditions on; take one of them out")
        if self.format not in ("auto", "hub"):
            for key in ("subset", "split", "revision"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} is for hub datasets, but format is {self.format}: take one of them out")
        return self


class CorpusConfig(BaseModel):
    """All inputs, in the order in which they are read, and what becomes of their documents."""

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)

    inputs: tuple[InputConfig, ...]
    curation: CurationConfig = CurationConfig()

    @field_validator("inputs")
    @classmethod
    def _give_names(cls, inputs: tuple[InputConfig, ...]) -> tuple[InputConfig, ...]:
        if not inputs:
            raise ValueError("a corpus needs at least one input: add {path: PATH}")
        given = [input_.name for input_ in inputs if input_.name]
        short = [default_name(input_.path) for input_ in inputs if not input_.name]
        named = []
        for input_ in inputs:
            name = input_.name or default_name(input_.path)
            if not input_.name and (name in given or short.count(name) > 1):
                name = input_.path
            named.append(input_.model_copy(update={"name": name}))
        names = [input_.name for input_ in named]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"two inputs are called {name!r}, but names must differ: give one of them another name"
                )
        return tuple(named)


def default_name(path: str) -> str:
    """`corpora/news.jsonl.gz` is called `news`, a folder by its own name, a pattern by the folder that it begins in."""
    if Path(path).exists():
        path = str(Path(path).resolve())
    elif "://" in path:
        path = path.partition("?")[0]
    parts = [part for part in PurePosixPath(path).parts if not set("*?[") & set(part)]
    return PurePosixPath(split_compression(parts[-1])[0]).stem if parts else path


def corpus_of(paths: Iterable[str | Path], text_field: str = "text") -> CorpusConfig:
    """The corpus of plain paths, uncurated. Raises ValueError as `load_corpus` does."""
    return _validated({"inputs": [{"path": str(path), "text_field": text_field} for path in paths]})


def load_corpus(path: Path) -> CorpusConfig:
    """Read a corpus from YAML.

    Raises:
        ValueError: the file is missing, or something in it is wrong: one line with key, value, rule and remedy.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such corpus file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is not a corpus: expected a mapping of inputs and curation")
    try:
        return _validated(tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _validated(tree: dict[str, Any]) -> CorpusConfig:
    try:
        return CorpusConfig.model_validate(tree)
    except ValidationError as error:
        raise ValueError("; ".join(map(_worded, error.errors()))) from None


def _worded(entry: Any) -> str:
    """One pydantic error as `key=value: rule; remedy`."""
    key = ".".join(map(str, entry["loc"]))
    message = entry["msg"].removeprefix("Value error, ")
    if entry["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(entry["loc"][-1]), _all_keys(CorpusConfig), n=1)
        return f"unknown key {key}: " + (f"did you mean {near[0]}?" if near else "take it out")
    if entry["type"] == "missing":
        return f"{key} is missing: set it"
    if entry["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key}={entry['input']!r}: {message[:1].lower()}{message[1:]}"


def _all_keys(annotation: Any) -> list[str]:
    """Every key that may stand somewhere in a tree of models, as it is written in YAML."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields.items()
        return [key for name, field in fields for key in (field.alias or name, *_all_keys(field.annotation))]
    return [key for inner in get_args(annotation) for key in _all_keys(inner)]
