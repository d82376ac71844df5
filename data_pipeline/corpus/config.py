"""Which texts a corpus is made of, in words: files, folders, object stores, hub datasets. No numpy, no files opened.

inputs:
  - {path: s3://crawl/2024-10/*.warc.gz, name: web}
  - {path: papers/, text_field: body, where: {language: en, score: {min: 0.5}}, weight: 2}
  - {path: owner/name, subset: science, split: train}
curation: {gopher: true, exact_duplicates: true}
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from data_pipeline.corpus.input_config import InputConfig, with_names
from data_pipeline.curation.config import CurationConfig


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
        return with_names(inputs)


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
