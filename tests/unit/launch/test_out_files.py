"""Files that a command writes in the end: refused at once where that cannot be, and nothing else is replaced."""

import os
from pathlib import Path

import pytest

from launch.out_files import check_out_files, encodable, write_out_file


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "gone" / "x.csv", tmp_path / "pipe", tmp_path / "link", Path("/dev/null")):
        with pytest.raises(ValueError, match=f"--csv {path} cannot be written: name a file in a folder that exists"):
            check_out_files({"--csv": path})
    check_out_files({"--csv": tmp_path / "x.csv", "--html": None})


def test_two_options_name_two_files(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "x")
    for other in (tmp_path / "x", tmp_path / "link"):
        with pytest.raises(ValueError, match=f"--html {other} is the file of --csv, too: name two files"):
            check_out_files({"--csv": tmp_path / "x", "--html": other})


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "x.csv")
    write_out_file(tmp_path / "link", "a\udcff 日本\n")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "x.csv").read_text(encoding="utf-8") == "a\\udcff 日本\n"


def test_what_an_encoding_has_not_is_told_by_escapes() -> None:
    assert encodable("a é 日", "latin-1") == "a é \\u65e5"
    assert encodable("a 日", None) == "a 日"
