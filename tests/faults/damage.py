"""What disks, people and other programs do to a checkpoint's files."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from data_pipeline.tokenizer_files import SENTENCEPIECE_NAME
from pretrain.checkpoint.index import INDEX_NAME, rank_file_name


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def lengthened(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


def zeroed(path: Path) -> None:
    """As long as it was, and nothing in it: what a file system may make of a file that was not fsynced."""
    path.write_bytes(bytes(path.stat().st_size))


def missing(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


TO_ONE_FILE: tuple[Callable[[Path], None], ...] = (
    *(truncated, emptied, lengthened, zeroed, missing),
    *(a_folder, a_dangling_link),
)


def of_the_checkpoint_before(path: Path) -> None:
    """The file of the same name, and the same length, of step 1."""
    shutil.copyfile(path.parent.with_name("step_00000001") / path.name, path)


def shards_swapped(checkpoint: Path) -> None:
    first, second = (checkpoint / rank_file_name(rank) for rank in (0, 1))
    first.rename(checkpoint / "third")
    second.rename(first)
    (checkpoint / "third").rename(second)


def shard_duplicated(checkpoint: Path) -> None:
    """The first rank's file stands in for the second's, too."""
    shutil.copyfile(checkpoint / rank_file_name(0), checkpoint / rank_file_name(1))


FILES = (rank_file_name(0), rank_file_name(1), INDEX_NAME, SENTENCEPIECE_NAME)
