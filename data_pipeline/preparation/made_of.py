"""What a finished data folder was made of, kept with it in few bytes: enough to say in what another request differs."""

import json
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.origins import ORIGINS_NAME, parse_origin_files
from data_pipeline.preparation.plan import DIFFERENCES, Plan, files_differ

REPORT_NAME = "report.json"
FILE_DIGITS = 8
"""Hexadecimal digits of a file's hash: there may be millions."""


def made_of(plan: Plan) -> dict[str, Any]:
    """What `report.json` keeps of a plan: its fingerprint, and a hash of each part that a person can change.

    A file is hashed with its size and tag. `files` holds one hash after another, in the order of `origins.json`;
    `evaluation_files`, of which there are few, each file's by its label.
    """
    tree = plan.to_json()
    hashes = {key: _hash(tree[key]) for key in DIFFERENCES if key != "packs"}
    evaluation = {
        planned.file.label: _hash(file)
        for planned, file in zip(plan.evaluation_files, tree["evaluation_files"], strict=True)
    }
    files = "".join(map(_hash, tree["files"]))
    return {"fingerprint": plan.fingerprint, **hashes, "files": files, "evaluation_files": evaluation}


def _hash(tree: Any) -> str:
    return xxhash.xxh32_hexdigest(json.dumps(tree).encode())


def difference(out: Path, plan: Plan) -> str | None:
    """In what the plan of a finished folder differs from `plan`, in words; None if it does not.

    Raises:
        ValueError: what the folder says about itself is damaged.
    """
    path = out / REPORT_NAME
    try:
        then: dict[str, Any] = json.loads(path.read_bytes())["plan"]
        if then["fingerprint"] == plan.fingerprint:
            return None
        now = made_of(plan)
        for key, words in DIFFERENCES.items():
            if key in now and then[key] != now[key]:
                return words
        labels = [file.path for file in parse_origin_files((out / ORIGINS_NAME).read_bytes(), str(out / ORIGINS_NAME))]
        then_files = _hashes(labels, then)
    except FileNotFoundError as error:
        return f"other inputs or settings, or by another Steppe: it has no {Path(error.filename).name}"
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): copy it again, or remove {out} and prepare it again"
        ) from None
    return files_differ(then_files, _hashes([planned.file.label for planned in plan.files], now))


def _hashes(labels: list[str], made: dict[str, Any]) -> dict[str, str]:
    """The hash of each file by its label."""
    files = made["files"]
    parted = [files[start : start + FILE_DIGITS] for start in range(0, len(files), FILE_DIGITS)]
    return dict(zip(labels, parted, strict=True)) | made["evaluation_files"]
