"""An engine that has trained, a tokenizer's file, small blocks, and a disk that is soon full."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.checkpoint import commit, rank_file, save
from pretrain.engine_torch import TorchEngine
from tests.small_disk import mount, unmount
from tests.unit.pretrain.checkpoint.made import SMALL_BLOCK, new_engine, train


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[None]:
    """Blocks of 64 bytes, and reads and writes not much longer: a small file has many, which end anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (rank_file, save, commit):
            patch.setattr(module, "BLOCK_BYTES", SMALL_BLOCK)
        patch.setattr(rank_file, "READ_BYTES", 100)
        patch.setattr(rank_file, "_WRITE_BYTES", 36)
        yield


@pytest.fixture
def engine() -> TorchEngine:
    """After two steps."""
    made = new_engine("precision=fp32")
    for step in range(2):
        train(made, step)
    return made


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Nothing here asks what is in it."""
    path = tmp_path / "tokenizer.of_the_run"
    path.write_bytes(b"a tokenizer")
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 1 MiB."""
    path = tmp_path / "disk"
    mount(path, megabytes=1)
    yield path
    unmount(path)
