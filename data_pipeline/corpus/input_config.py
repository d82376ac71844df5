"""One source of text in words, and which of its records are documents. No numpy, no files opened."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_pipeline.corpus.formats import Format, split_compression
from data_pipeline.remote import is_local, shown

Scalar = str | bool | int | float | None
Bound = Annotated[float, Field(allow_inf_nan=False)] | str


class ConditionConfig(BaseModel):
    """What a field of a record must be. Bounds are inclusive, and compare numbers with numbers, texts with texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)

    one_of: tuple[Scalar, ...] | None = Field(default=None, alias="in")
    min: Bound | None = None
    max: Bound | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_scalar(cls, value: Any) -> Any:
        return value if isinstance(value, Mapping | ConditionConfig) else {"in": [value]}

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        if self.one_of is None and self.min is None and self.max is None:
            raise ValueError("a condition that asks nothing: give a value, {in: [...]}, {min: ...} or {max: ...}")
        bounds = [bound for bound in (self.min, self.max) if bound is not None]
        known = bounds if self.one_of is None else self.one_of
        # What lies between two bounds at all, the bounds do themselves.
        if not any(map(self.holds, known)):
            asked = self.model_dump(mode="json", exclude_none=True)
            raise ValueError(
                f"no value meets {asked}: min must not be larger than max, both of one kind, and `in` must list a "
                "value between them"
            )
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


def with_names(inputs: Sequence[InputConfig]) -> tuple[InputConfig, ...]:
    """Inputs of which each has a name that no other has: the given one, or one by its path.

    That is the path's `default_name`, if that is another's name too the whole path, and where URLs are the same but for
    what is never shown of them, the path and a number.

    Raises:
        ValueError: two inputs were given the same name, or are the same path.
    """
    names = [input_.name or default_name(input_.path) for input_ in inputs]
    for longer_name in (shown, partial(_numbered, inputs=inputs)):
        times = Counter(names)
        names = [
            name if input_.name or times[name] == 1 else longer_name(input_.path)
            for name, input_ in zip(names, inputs, strict=True)
        ]
    name, times_used = Counter(names).most_common(1)[0]
    if times_used > 1:
        raise ValueError(f"two inputs are called {name!r}, but names must differ: give one of them another name")
    return tuple(input_.model_copy(update={"name": name}) for name, input_ in zip(names, inputs, strict=True))


def default_name(path: str) -> str:
    """`corpora/news.jsonl.gz` is called `news`, a folder by its own name, a pattern by the folder that it begins in."""
    if not is_local(path):
        path = shown(path)
    elif Path(path).exists():
        path = str(Path(path).resolve())
    parts = [part for part in PurePosixPath(path).parts if not set("*?[") & set(part)]
    return PurePosixPath(split_compression(parts[-1])[0]).stem if parts else path


def _numbered(path: str, inputs: Sequence[InputConfig]) -> str:
    alike = list(dict.fromkeys(input_.path for input_ in inputs if shown(input_.path) == shown(path)))
    return f"{shown(path)} ({alike.index(path) + 1})" if len(alike) > 1 else shown(path)
