"""Files that a command writes when its work is done, such as a table or a page."""

import os
from collections.abc import Mapping
from pathlib import Path


def check_out_files(files: Mapping[str, Path | None]) -> None:
    """Raise ValueError, before hours of work, for a file that cannot be written in the end.

    files: by the options that name them; None for one that is not asked for.
    """
    seen: dict[Path, str] = {}
    for option, path in files.items():
        if path is None:
            continue
        file = path.resolve()
        if (path.exists() and not path.is_file()) or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
            raise ValueError(f"{option} {path} cannot be written: name a file in a folder that exists and is yours")
        if file in seen:
            raise ValueError(f"{option} {path} is the file of {seen[file]}, too: name two files")
        seen[file] = option


def write_out_file(path: Path, text: str) -> None:
    """Write it whole, or leave what was there. A link stays one: what it leads to is written."""
    from pretrain.run_dir import write_durably

    write_durably(path.resolve(), encodable(text))


def encodable(text: str, encoding: str | None = "utf-8") -> str:
    """With escapes for what cannot be encoded: a name may come from a folder whose name is no UTF-8, and a terminal's
    encoding may know few characters."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
