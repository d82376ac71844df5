"""What the next checkpoints need, by counting through real saves, and when that is said."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.checkpoint.folder import kept_steps, list_checkpoints
from pretrain.checkpoint.index import read_index
from pretrain.config import CheckpointConfig
from pretrain.low_disk import DiskWatch, checkpoint_bytes, in_units, needed_bytes
from pretrain.recipe import load_config
from tests.small_disk import mount, unmount
from tests.small_run import RECIPE, SMALL
from tests.tiny_run import write_run

MB = 1_000_000


@pytest.mark.parametrize(
    ("steps", "step", "settings", "checkpoints"),
    [
        ([], 0, {}, 3),  # keep = 2, and one that is being written
        ([10], 10, {}, 2),
        ([10, 20], 20, {}, 1),
        ([10, 20], 25, {}, 1),
        ([10, 20], 20, {"keep": 1}, 1),  # it is pruned after a save, not before
        ([10, 20], 20, {"keep_every_steps": 10}, 3),  # each stays for good
        ([10, 20], 20, {"keep_every_steps": 20}, 2),  # 20, 30, 40 and the one of 50, then 20, 40, 50 and that of 60
        ([10, 20], 20, {"keep_best": True}, 2),  # the present best stays, and the last two
        ([], 0, {"every_steps": 0}, 1),  # at the end
        ([7], 7, {"every_steps": 0}, 1),
    ],
)
def test_what_the_next_saves_need(steps: list[int], step: int, settings: dict, checkpoints: int) -> None:
    config = CheckpointConfig.model_validate({"every_steps": 10, "keep": 2, **settings})
    assert needed_bytes(1000, steps, step, config) == 1000 * checkpoints


@given(st.integers(1, 4), st.sampled_from([0, 10, 20, 30]), st.integers(0, 12))
def test_a_run_that_is_not_warned_never_runs_out_before_its_next_look(keep: int, pinned: int, saved: int) -> None:
    """From any state that a run comes to: with what is said to be needed, a save more always fits."""
    config = CheckpointConfig(every_steps=10, keep=keep, keep_every_steps=pinned)
    steps: list[int] = []
    for save in range(10, 10 * saved + 1, 10):
        steps = sorted(kept_steps([*steps, save], config, None))
    needed = needed_bytes(1, steps, 10 * saved, config)
    most, there = len(steps), list(steps)
    for save in range(10 * saved + 10, 10 * (saved + keep + 1) + 1, 10):
        most = max(most, len(there) + 1)
        there = sorted(kept_steps([*there, save], config, None))
    assert needed == most - len(steps)
    assert needed >= 1 or saved > keep


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_size_of_a_checkpoint(tmp_path: Path, optimizer: str) -> None:
    """A written one has headers besides, which are much of a tiny one."""
    run = write_run(tmp_path / "run", steps=(10,))
    stored = read_index(list_checkpoints(run.checkpoints)[0])
    config = load_config(run.config_path)
    estimate = checkpoint_bytes(config)
    assert estimate <= stored.size_bytes < estimate + 200 * 3 * len(stored.parameters) + 2000
    small = load_config(RECIPE, [*SMALL, f"optimizer.name={optimizer}"])
    parameters = checkpoint_bytes(load_config(RECIPE, [*SMALL])) // 12
    assert (checkpoint_bytes(small) == 12 * parameters) == (optimizer == "adamw")
    assert checkpoint_bytes(small) >= 8 * parameters


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    mount(tmp_path / "disk", megabytes=4)
    yield tmp_path / "disk"
    unmount(tmp_path / "disk")


def test_a_disk_is_said_to_be_low_once_until_it_is_better(disk: Path) -> None:
    config = load_config(RECIPE, [*SMALL, "checkpoint={every_steps: 1, keep: 2}"])
    folder = disk / "run" / "checkpoints"  # not there before the first save
    watch = DiskWatch(folder, config)
    assert 0 < 3 * watch.size_bytes < 4 * MB
    assert watch.look(0) is None
    ballast = disk / "ballast"

    def leave(checkpoints: float) -> None:
        ballast.unlink(missing_ok=True)
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        with open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - int(checkpoints * watch.size_bytes))

    leave(2.5)
    low = watch.look(0)
    assert low is not None
    assert 2 * watch.size_bytes < low.free_bytes < low.needed_bytes == 3 * watch.size_bytes
    assert f"the disk of {folder} is nearly full: {in_units(low.free_bytes)} are free" in str(low)
    assert watch.look(1) is None
    leave(3.5)
    assert watch.look(2) is None
    leave(2.5)
    assert watch.look(3) is not None


def test_units() -> None:
    assert in_units(3_240_000_000) == "3.2 GB"
    assert in_units(51_000) == "0.1 MB"
