"""From YAML and `--set key=value` to a RunConfig, with errors that a person can act on."""

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import xxhash
import yaml
from pydantic import BaseModel, ValidationError

from pretrain.config import RunConfig
from pretrain.run_dir import write_durably

Tree = TypeVar("Tree", bound=BaseModel)
# What may stand in a section but is no field of it.
ALIASES: dict[str, tuple[str, ...]] = {"model": ("preset",)}


def load_config(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML recipe, apply the overrides in order, validate.

    Raises ValueError (one line: value, rule, remedy) for anything that is wrong with it.
    """
    return validated(apply_overrides(read_mapping(path, "recipe", "sections such as model, data and batch"), overrides))


def read_mapping(path: Path, kind: str, contents: str) -> dict[str, Any]:
    """A YAML file that must hold a mapping. `kind` and `contents` say in errors what it should have been."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such {kind}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is not a {kind}: expected a mapping of {contents}")
    return tree


def apply_overrides(tree: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """`a.b=VALUE`, VALUE in YAML: a mapping merges into what is there, anything else replaces it. A new tree."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(f"--set {override}: expected KEY=VALUE with a dotted key, such as optimizer.lr=3e-4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {key}: {text!r} is not valid YAML: {' '.join(str(error).split())}") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = merged(tree, value)
    return tree


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`change` laid over `base`, mapping by mapping."""
    result = dict(base)
    for key, value in change.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


def validated(tree: dict[str, Any]) -> RunConfig:
    """Validate a run's tree; all of its mistakes on one line each, the first one leading."""
    return validated_as(RunConfig, tree)


def validated_as(model: type[Tree], tree: dict[str, Any]) -> Tree:
    """Validate a tree of any model; all of its mistakes on one line each, the first one leading."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ValueError("; ".join(_worded(model, tree, entry) for entry in error.errors())) from None


def _worded(model: type[BaseModel], tree: dict[str, Any], entry: Any) -> str:
    """One pydantic error as `key=value: rule; remedy`."""
    parts = _named_parts(tree, [str(part) for part in entry["loc"]])
    key = ".".join(parts)
    if entry["type"] == "extra_forbidden":
        known = _keys_of_section(model, parts[:-1])
        near = difflib.get_close_matches(parts[-1], known, n=1) or difflib.get_close_matches(
            parts[-1], _all_keys(model), n=1
        )
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {key}: {hint}"
    if entry["type"] == "missing":
        if model is not RunConfig:
            return f"{key} is missing: set it"
        by_override = "" if any(part.isdigit() for part in parts) else f" or with --set {key}=VALUE"
        return f"{key} is missing: set it in the recipe{by_override}"
    message = entry["msg"].removeprefix("Value error, ")
    if entry["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}={entry['input']!r}: {message[:1].lower()}{message[1:]}"


def _named_parts(tree: Any, location: list[str]) -> list[str]:
    """A pydantic location without the tags of unions, which nobody wrote (`model.rope_scaling.linear.factor`)."""
    parts = []
    for index, part in enumerate(location):
        if isinstance(tree, dict) and part not in tree and index + 1 < len(location):
            continue
        parts.append(part)
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list):
            tree = tree[int(part)]
    return parts


def _section(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as `tuple[SourceConfig, ...]` or `RopeScaling | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is None:
        return None
    return next((found for inner in get_args(annotation) if (found := _section(inner))), None)


def _keys_of_section(model: type[BaseModel], parts: list[str]) -> list[str]:
    section = model
    for part in parts:
        field = section.model_fields.get(part)
        section = (_section(field.annotation) if field else None) or section
    return [*section.model_fields, *ALIASES.get(".".join(parts), ())]


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        keys += [prefix + name, *(_all_keys(inner, f"{prefix}{name}.") if inner else [])]
    return keys


SEAL = "# Steppe wrote this; change a run with: steppe resume RUN --set KEY=VALUE. xxh3 "


def dump_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as YAML, durably, with a last line by which `check_unchanged` knows it."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_durably(path, f"{text}{SEAL}{xxhash.xxh3_64_hexdigest(text.encode())}\n")


def check_unchanged(path: Path) -> None:
    """Raise ValueError if a run's config is not as `dump_config` wrote it, its last line included."""
    text, seal, fingerprint = path.read_text(encoding="utf-8").partition(SEAL)
    if not seal or fingerprint.strip() != xxhash.xxh3_64_hexdigest(text.encode()):
        raise ValueError(
            f"{path} was changed by hand, so what the run has learnt by is not on record: put it back (index.json of "
            "the newest checkpoint holds it, too), and change a run with --set KEY=VALUE"
        )
