"""Which checkpoints a folder has, which of them stay, and what is not there by mistake."""

import errno
import math
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.checkpoint.folder import (
    checkpoint_path,
    kept_steps,
    list_checkpoints,
    list_damaged,
    newest_checkpoint,
    none_is_whole,
    prune_checkpoints,
    remove,
    remove_leftovers,
    restore_replaced,
    set_aside,
    step_of,
    whole_checkpoints,
)
from pretrain.checkpoint.index import CheckpointIndex, DamagedError, write_index
from pretrain.config import CheckpointConfig
from pretrain.engine_torch import TorchEngine
from tests.small_run import small_config
from tests.unit.pretrain.checkpoint.made import DAMAGE, RANK_FILE, save, truncate

configs = st.builds(
    lambda keep, every, multiple, best: CheckpointConfig(
        every_steps=every, keep=keep, keep_every_steps=every * multiple, keep_best=best
    ),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 3),
    st.booleans(),
)
losses_by_step = st.dictionaries(st.integers(1, 12), st.floats(0, 9) | st.just(math.nan) | st.just(math.inf))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The least that is a whole checkpoint: an index that counts no file."""
    path = tmp_path_factory.mktemp("whole")
    index = CheckpointIndex(
        step=0, model=small_config().model, sequence_length=1, block_bytes=1, files=[], parameters={}
    )
    write_index(path, index)
    return path


def put(folder: Path, whole: Path, *steps: int) -> None:
    """Whole checkpoints of these steps."""
    for step in steps:
        shutil.copytree(whole, checkpoint_path(folder, step))


def tear(folder: Path, *steps: int) -> None:
    for step in steps:
        truncate(checkpoint_path(folder, step) / "index.json")


def steps_in(folder: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(folder)]


@given(st.sets(st.integers(1, 12), min_size=1).map(sorted), configs, st.data())
def test_what_is_kept_is_kept_for_a_reason(steps: list[int], config: CheckpointConfig, data: st.DataObject) -> None:
    best = data.draw(st.none() | st.sampled_from(steps))
    kept = kept_steps(steps, config, best)
    for step in steps:
        newest = sum(other > step for other in steps) < config.keep
        for_good = config.keep_every_steps > 0 and step % config.keep_every_steps == 0
        assert (step in kept) == (newest or for_good or step == best)
    assert kept <= set(steps)


@settings(max_examples=50)
@given(
    st.dictionaries(st.integers(1, 12), st.booleans(), min_size=1),
    st.sets(st.integers(1, 12)),
    configs,
    losses_by_step,
)
def test_pruning_keeps_what_it_must_and_no_more(
    tmp_path_factory: pytest.TempPathFactory,
    whole: Path,
    is_whole: dict[int, bool],
    damaged: set[int],
    config: CheckpointConfig,
    losses: dict[int, float],
) -> None:
    folder = tmp_path_factory.mktemp("pruned")
    put(folder, whole, *is_whole)
    tear(folder, *(step for step in is_whole if not is_whole[step]))
    for step in damaged:
        (folder / f"step_{step:08d}.damaged").mkdir()
    prune_checkpoints(folder, config, losses)
    left, sound, newest = set(steps_in(folder)), sorted(step for step in is_whole if is_whole[step]), max(is_whole)
    aside = {step_of(path) for path in list_damaged(folder)}
    assert not list(folder.glob("*.tmp"))
    if not is_whole[newest]:
        assert (left, aside) == (set(is_whole), damaged)
        return
    assert aside == {step for step in damaged if step > newest}
    last = sound[-config.keep :]
    measured = {step: losses[step] for step in sound if not math.isnan(losses.get(step, math.nan))}
    best = {min(measured, key=lambda step: (measured[step], step))} if config.keep_best and measured else set()
    for_good = {step for step in is_whole if config.keep_every_steps and step % config.keep_every_steps == 0}
    assert left & set(sound) == {*last, *best, *(for_good & set(sound))}
    if len(sound) >= config.keep:  # what is torn takes no place, and only stays by the rule that has no number
        assert left <= {*sound, *for_good}


def test_torn_ones_do_not_count(whole: Path, tmp_path: Path) -> None:
    put(tmp_path, whole, 1, 2, 3, 4, 5)
    tear(tmp_path, 3, 4)
    prune_checkpoints(tmp_path, CheckpointConfig(keep=2), {})
    assert steps_in(tmp_path) == [2, 5]


def test_nothing_goes_while_the_newest_is_torn(whole: Path, tmp_path: Path) -> None:
    put(tmp_path, whole, 1, 2, 3)
    (tmp_path / "step_00000002.damaged").mkdir()
    tear(tmp_path, 3)
    prune_checkpoints(tmp_path, CheckpointConfig(keep=1), {})
    assert steps_in(tmp_path) == [1, 2, 3]
    assert len(list_damaged(tmp_path)) == 1
    tear(tmp_path, 1, 2)
    prune_checkpoints(tmp_path, CheckpointConfig(keep=1), {})
    assert steps_in(tmp_path) == [1, 2, 3]


def test_what_was_set_aside_goes_when_the_run_has_caught_up(whole: Path, tmp_path: Path) -> None:
    put(tmp_path, whole, 1, 2)
    set_aside(checkpoint_path(tmp_path, 2))
    assert [path.name for path in list_damaged(tmp_path)] == ["step_00000002.damaged"]
    assert steps_in(tmp_path) == [1]
    prune_checkpoints(tmp_path, CheckpointConfig(), {})
    assert len(list_damaged(tmp_path)) == 1
    put(tmp_path, whole, 2)
    set_aside(checkpoint_path(tmp_path, 2))  # once more: one of a step is enough
    assert len(list_damaged(tmp_path)) == 1
    put(tmp_path, whole, 2)
    prune_checkpoints(tmp_path, CheckpointConfig(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_saves_keep_the_newest(engine: TorchEngine, tmp_path: Path) -> None:
    for step in (9, 10, 11, 100_000_000):
        save(tmp_path, engine, step)  # keeps 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000011", "step_100000000"]
    assert (tmp_path / "latest").read_text() == "step_100000000\n"


def test_checkpoints_are_listed_by_step(whole: Path, tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "nowhere") == []
    assert list_damaged(tmp_path / "nowhere") == []
    put(tmp_path, whole, 100_000_000, 20, 3)
    for name in ("step_00000004.tmp", "step_00000005.damaged", "step_6", "step_00000007.replaced.tmp", "step_", "x"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest").write_text("step_00000004")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000003", "step_00000020", "step_100000000"]
    assert [step_of(path) for path in list_damaged(tmp_path)] == [5]


def test_leftovers_go_and_nothing_else(whole: Path, tmp_path: Path) -> None:
    put(tmp_path, whole, 3)
    for name in ("step_00000004.tmp", "step_00000005.damaged", "step_00000003.replaced.tmp", "step_00000001.tmp"):
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / "latest.tmp").write_text("step_00")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000005.damaged"]


def test_what_made_way_for_a_save_that_never_came_is_given_its_name_back(whole: Path, tmp_path: Path) -> None:
    put(tmp_path, whole, 3, 4)
    (tmp_path / "step_00000003").rename(tmp_path / "step_00000003.replaced.tmp")
    shutil.copytree(whole, tmp_path / "step_00000004.replaced.tmp")
    restore_replaced(tmp_path)
    assert steps_in(tmp_path) == [3, 4]
    (tmp_path / "step_00000003").rename(tmp_path / "step_00000003.replaced.tmp")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def test_what_is_removed_is_gone(whole: Path, tmp_path: Path) -> None:
    put(tmp_path, whole, 3, 4)
    remove(checkpoint_path(tmp_path, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


def test_the_newest_that_is_whole_is_found(engine: TorchEngine, tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    paths = [save(tmp_path, engine, step, None, "checkpoint.keep=9") for step in (1, 2, 3, 4)]
    shutil.copytree(paths[3], tmp_path / "step_00000005.tmp")
    (paths[3] / "index.json").write_text('{"format": 1, "st')
    (paths[2] / RANK_FILE).unlink()
    problems: list[Exception] = []
    assert newest_checkpoint(tmp_path, problems) == newest_checkpoint(tmp_path) == paths[1]
    assert "index.json is damaged" in str(problems[0])
    assert f"{RANK_FILE} is missing" in str(problems[1])
    assert list(whole_checkpoints(tmp_path, [])) == [paths[1], paths[0]]


def test_no_usable_checkpoint_is_an_error(whole: Path, tmp_path: Path) -> None:
    put(tmp_path, whole, 3, 8)
    tear(tmp_path, 3)
    DAMAGE["nothing"][0](checkpoint_path(tmp_path, 8))
    with pytest.raises(ValueError, match=f"none of the checkpoints in {tmp_path} can be used: ") as caught:
        newest_checkpoint(tmp_path)
    reasons = ["00000008/index.json is missing", "00000003/index.json is damaged", "or move the folder away to train"]
    places = [str(caught.value).index(reason) for reason in reasons]
    assert places == sorted(places)
    assert "\n" not in str(caught.value)
    assert str(none_is_whole(tmp_path, ["this", "that"])).startswith(
        f"none of the checkpoints in {tmp_path} can be used: this; that. Restore one, or"
    )


def test_what_cannot_be_read_is_no_reason_to_remove(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index on a disk that fails for a moment: nothing goes, and the next pruning does its work."""
    put(tmp_path, whole, 1, 2, 3, 4)
    index, read_bytes = checkpoint_path(tmp_path, 3) / "index.json", Path.read_bytes

    def failing(path: Path) -> bytes:
        if path == index:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read_bytes(path)

    config = CheckpointConfig(keep=2)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", failing)
        with pytest.raises(OSError, match="Stale file handle"):
            prune_checkpoints(tmp_path, config, {})
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    prune_checkpoints(tmp_path, config, {})
    assert steps_in(tmp_path) == [3, 4]


def test_one_that_cannot_be_removed_keeps_no_other(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, whole, 1, 2, 3)
    rmtree = shutil.rmtree

    def failing(path: Path) -> None:
        if "step_00000001" in path.name:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", failing)
    with pytest.raises(OSError, match="Directory not empty"):
        prune_checkpoints(tmp_path, CheckpointConfig(keep=1), {})
    assert steps_in(tmp_path) == [3]
    (tmp_path / "step_00000009.tmp").mkdir()
    with pytest.raises(OSError, match="Directory not empty"):
        remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["step_00000001.tmp"]


def test_an_unreadable_one_among_them_is_worth_another_try() -> None:
    damaged, unreadable = DamagedError("its hash"), OSError(errno.EIO, "Input/output error")
    assert isinstance(none_is_whole(Path("c"), [damaged]), ValueError)
    assert isinstance(none_is_whole(Path("c"), [damaged, unreadable]), OSError)
