"""The result of an evaluation as a CSV file: one row a domain and one for all of them, every number in full."""

import csv
import io
from collections.abc import Mapping
from typing import Any

from launch.evaluation_words import whole_name
from pretrain.evaluation.score import MEASURES

SETTING = ("model", "step", "precision", "window", "stride", "start_token", "eos_scored")
COUNTS = ("tokens", "bytes", "words", "documents")
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def csv_text(result: Mapping[str, Any]) -> str:
    """The whole file, with a heading. What there is not, such as an interval of one document, is an empty cell.

    result: what `steppe eval --json` prints. The columns are always the same. `MEASURE_low` and `MEASURE_high` bound
    the interval at `interval_level`; `MEASURE_difference` is this model's minus that of `compared_with`. A name that a
    spreadsheet would compute begins with an apostrophe.
    """
    whole = whole_name(result["by_domain"])
    rows = {**result["by_domain"], whole: result}
    compared = result["compared"]
    differences: Mapping[str, Any] = {} if compared is None else {**compared["by_domain"], whole: compared}
    out = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for name, score in rows.items():
        row = {key: result[key] for key in SETTING} | {"domain": name} | {key: score[key] for key in COUNTS}
        interval = score["interval"]
        row["interval_level"] = interval and interval["level"]
        for measure in MEASURES:
            row[measure] = score[measure]
            row |= _bounds(measure, interval and interval[measure])
        row["compared_with"] = compared and compared["with"]
        for measure in ("loss", "bits_per_byte"):
            found = differences[name]["measures"].get(measure, {}) if differences else {}
            row[f"{measure}_difference"] = found.get("difference")
            row |= _bounds(f"{measure}_difference", found.get("interval"))
        if writer is None:
            # All texts in quotes: by default a carriage return alone would be in none, and end a row.
            writer = csv.DictWriter(out, list(row), lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
            writer.writeheader()
        writer.writerow({key: _harmless(value) if isinstance(value, str) else value for key, value in row.items()})
    return out.getvalue()


def _harmless(text: str) -> str:
    """A name may come from a field of somebody's data, and `=HYPERLINK(...)` is a formula to who opens the file."""
    return f"'{text}" if text.startswith(FORMULA) else text


def _bounds(name: str, interval: list[float] | None) -> dict[str, float | None]:
    low, high = (None, None) if interval is None else interval
    return {f"{name}_low": low, f"{name}_high": high}
