"""A checkpoint of two ranks that is not what was written: found, named, set aside, and the one before loaded."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.tokenizer_files import SENTENCEPIECE_NAME
from pretrain.checkpoint.folder import checkpoint_path
from pretrain.checkpoint.index import INDEX_NAME, DamagedError, rank_file_name, read_index
from pretrain.checkpoint.load import load_newest
from pretrain.checkpoint.save import save_checkpoint
from tests.checkpoint_edit import flip_bit
from tests.conftest import Steppe
from tests.dist.test_run import curve, weights
from tests.faults import damage
from tests.faults.savers import Action, act
from tests.faults.states import RowsEngine, faults_config, names_in

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 1 and 2, saved by two ranks, that nothing has befallen."""
    scratch = tmp_path_factory.mktemp("whole")
    tokenizer = scratch / "tokenizer.model"
    tokenizer.write_bytes(bytes(range(256)))
    for step in (1, 2):
        assert act(Action("save", scratch / "checkpoints", 2, step, tokenizer), scratch) == [0, 0]
    return scratch / "checkpoints"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy, to damage the newest in."""
    return Path(shutil.copytree(whole, tmp_path / "checkpoints"))


@pytest.fixture(scope="module")
def engine() -> RowsEngine:
    """Of one rank: another layout than that of the checkpoints."""
    return RowsEngine(faults_config())


def falls_back(folder: Path, engine: RowsEngine, culprit: str) -> None:
    """The older checkpoint is loaded, bit for bit; the reason names the culprit; the newer is set aside."""
    engine.become(7)
    restored = load_newest(folder, engine, None)
    assert restored.state.step == 1, f"{culprit}: {restored}"
    assert engine.differences(1) == []
    (reason,) = restored.passed_over
    assert str(checkpoint_path(folder, 2) / culprit) in reason
    assert names_in(folder) == ["latest", "step_00000001", "step_00000002.damaged"]


def again(whole: Path, folder: Path) -> Path:
    """The folder as it was before the last damage; returns its newest checkpoint."""
    shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    return checkpoint_path(folder, 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bit_of_a_ranks_file(whole: Path, folder: Path, engine: RowsEngine, rank: int) -> None:
    """At the ends of each of its parts, and anywhere."""
    path = checkpoint_path(folder, 2) / rank_file_name(rank)
    size, start = path.stat().st_size, 8 + int.from_bytes(path.read_bytes()[:8], "little")
    hashes = read_index(path.parent).block_bytes
    hashes = size - 8 * -(-(size - start) // (hashes + 8))
    assert 8 < start < hashes < size
    random = np.random.default_rng(rank)
    places = [0, 7, 8, start - 1, start, hashes - 1, hashes, size - 1, *random.integers(0, size, 40).tolist()]
    for place in places:
        again(whole, folder)
        flip_bit(path, place, int(random.integers(8)))
        falls_back(folder, engine, path.name)


@pytest.mark.parametrize("name", [INDEX_NAME, SENTENCEPIECE_NAME])
def test_every_byte_of_a_small_file(folder: Path, engine: RowsEngine, name: str) -> None:
    checkpoint = checkpoint_path(folder, 2)
    path = checkpoint / name
    for place in range(0, path.stat().st_size, 1 if name == SENTENCEPIECE_NAME else 3):
        flip_bit(path, place, place % 8)
        with pytest.raises(DamagedError, match=name):
            read_index(checkpoint)
        flip_bit(path, place, place % 8)
    read_index(checkpoint)
    flip_bit(path, 100)
    falls_back(folder, engine, name)


@pytest.mark.parametrize("name", damage.FILES)
@pytest.mark.parametrize("harm", damage.TO_ONE_FILE, ids=lambda harm: harm.__name__)
def test_a_file_that_is_not_what_it_was(
    folder: Path, engine: RowsEngine, name: str, harm: Callable[[Path], None]
) -> None:
    harm(checkpoint_path(folder, 2) / name)
    falls_back(folder, engine, name)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_shard_of_the_checkpoint_before(folder: Path, engine: RowsEngine, rank: int) -> None:
    """Whole in itself, and of the right length: only the index knows that it is not of this checkpoint."""
    shard = checkpoint_path(folder, 2) / rank_file_name(rank)
    damage.of_the_checkpoint_before(shard)
    falls_back(folder, engine, shard.name)


def test_an_index_of_the_checkpoint_before(folder: Path, engine: RowsEngine) -> None:
    """It is whole; the shards are not those that it tells of."""
    damage.of_the_checkpoint_before(checkpoint_path(folder, 2) / INDEX_NAME)
    falls_back(folder, engine, INDEX_NAME)


@pytest.mark.parametrize(
    ("harm", "rank"), [(damage.shards_swapped, 0), (damage.shard_duplicated, 1)], ids=["swapped", "duplicated"]
)
def test_shards_in_each_others_place(folder: Path, engine: RowsEngine, harm: Callable[[Path], None], rank: int) -> None:
    harm(checkpoint_path(folder, 2))
    falls_back(folder, engine, rank_file_name(rank))


def test_two_ranks_agree_where_only_one_finds_the_damage(folder: Path, tmp_path: Path) -> None:
    """Each of two ranks reads its own half; what the second finds, both act on."""
    flip_bit(checkpoint_path(folder, 2) / rank_file_name(1), -100)
    assert act(Action("load", folder, 2), tmp_path) == [0, 0]
    assert names_in(folder) == ["latest", "step_00000001", "step_00000002.damaged"]


def test_nothing_is_touched_where_all_are_damaged(folder: Path, engine: RowsEngine) -> None:
    for step in (1, 2):
        flip_bit(checkpoint_path(folder, step) / rank_file_name(1), -100)
    with pytest.raises(ValueError, match="none of the checkpoints in .* can be used") as refusal:
        load_newest(folder, engine, None)
    assert str(refusal.value).count(rank_file_name(1)) == 2
    assert names_in(folder) == ["latest", "step_00000001", "step_00000002"]


@pytest.mark.parametrize("kind", ["missing", "empty", "garbage", "dangling", "dangling link", "link", "folder"])
def test_latest_is_only_a_hint(folder: Path, engine: RowsEngine, kind: str) -> None:
    """Whatever it is, the newest is loaded, the next save is committed and the older ones go."""
    latest = folder / "latest"
    assert latest.read_text() == "step_00000002\n"
    latest.unlink()
    if kind in ("empty", "garbage", "dangling"):
        latest.write_bytes({"empty": b"", "garbage": bytes(range(256)), "dangling": b"step_00000005\n"}[kind])
    elif kind in ("dangling link", "link"):
        latest.symlink_to("nowhere" if kind == "dangling link" else "step_00000001")
    elif kind == "folder":
        latest.mkdir()
    assert load_newest(folder, engine, None).state.step == 2
    assert engine.differences(2) == []
    save_checkpoint(folder, engine, engine.become(3), engine.config, None, None)
    assert [name for name in names_in(folder) if name.startswith("step")] == ["step_00000002", "step_00000003"]
    if kind != "folder":
        assert latest.read_text() == "step_00000003\n"
    assert load_newest(folder, engine, None).state.step == 3


def test_a_run_goes_on_from_the_one_before(undisturbed: Path, steppe: Steppe, tmp_path: Path) -> None:
    """The command line says which it resumes from, and why not from the newer; the curve is the undisturbed one's."""
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    older, newer = (checkpoint_path(run / "checkpoints", step) for step in (8, 12))
    flip_bit(newer / rank_file_name(1), -2000)
    (run / "checkpoints" / "latest").unlink()
    said = steppe("resume", run).stderr
    assert f"resumes after step 8 from {older} (passed over: {newer / rank_file_name(1)} is damaged: block " in said
    assert curve(run) == curve(undisturbed)
    assert weights(run) == weights(undisturbed)
    assert names_in(run / "checkpoints") == ["latest", older.name, newer.name]
