"""At every write point of a save: SIGKILL of one rank, SIGKILL of all, an error of the disk.

What is there afterwards is whole, old or new.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from pretrain.checkpoint.folder import checkpoint_path, list_checkpoints
from pretrain.checkpoint.load import load_checkpoint, load_newest
from pretrain.checkpoint.save import CheckpointSaver, Saved, save_checkpoint
from tests.checkpoint_edit import flip_bit
from tests.faults import disk
from tests.faults.savers import LOST_A_PEER, Action, Kill, act, write_points
from tests.faults.states import RowsEngine, faults_config, names_in

pytestmark = pytest.mark.slow
SIGKILLED = -9
Name = Literal["save", "again", "aside"]


@dataclass(frozen=True)
class Scene:
    """An action on a folder, and what a load must find if it was cut short: `old`, or from `commit` on `new`."""

    action: Action
    old: int
    new: int
    commit: str


def scene(name: Name, folder: Path, tokenizer: Path, world: int) -> Scene:
    """Make the folder of a scene.

    save: a third checkpoint, with which the first has to go, and so has whatever kills and resumes have left.
    again: the only checkpoint is made once more. aside: a load, which passes over a damaged one.
    """
    keep = ("checkpoint.keep=1",) if name == "again" else ()
    save = Action("save", folder, world, 2, tokenizer, keep)
    for step in (2,) if name == "again" else (1, 2):
        act(replace(save, step=step), tokenizer.parent)
    if name == "again":
        return Scene(save, 2, 2, "replace step_00000002.tmp step_00000002")
    if name == "aside":
        flip_bit(checkpoint_path(folder, 2) / "rank-00000.safetensors", -500)
        return Scene(Action("load", folder, world), 1, 1, "replace step_00000002 step_00000002.damaged")
    shutil.copytree(checkpoint_path(folder, 1), folder / "step_00000002.damaged")
    shutil.copytree(checkpoint_path(folder, 1), folder / "step_00000003.tmp")
    (folder / "latest.tmp").touch()
    return Scene(replace(save, step=3), 2, 3, "replace step_00000003.tmp step_00000003")


class Sweep:
    """Kills an action of a scene at one write point after the other."""

    def __init__(self, made: Scene, scratch: Path) -> None:
        self.scene, self.scratch = made, scratch
        self.template = Path(shutil.copytree(made.action.folder, scratch / "template"))
        self.points = write_points(made.action, scratch)
        self.engine = RowsEngine(faults_config())

    def kill(self, kill: Kill) -> list[int]:
        """Carry the action out until it is killed, and check what there is then; returns the ranks' exit codes."""
        folder = self.fresh()
        codes = act(replace(self.scene.action, folder=folder, kill=kill), self.scratch)
        committed = kill.rank == 0 and self.points[0].index(self.scene.commit) < kill.number
        try:
            self.check(folder, self.scene.new if committed else self.scene.old)
        except Exception as error:
            raise AssertionError(f"{kill} before: {self.points[kill.rank][kill.number]}") from error
        return codes

    def fail(self, number: int) -> None:
        """Carry a save out on one rank, with an error of the disk at a write point, and check what there is then."""
        folder, action, reports = self.fresh(), self.scene.action, list[Saved]()
        saver = CheckpointSaver(folder, self.engine, self.engine.config, action.tokenizer, None, report=reports.append)
        with disk.watched(folder, disk.at(number, disk.fail)):
            saver.start(self.engine.become(action.step))
            saver.close()
        renamed = self.points[0].index(self.scene.commit)
        failure, note, point = reports[0].failure, reports[0].note, self.points[0][number]
        assert "Input/output error" in str(note if failure is None else failure), point
        # Neither a leftover that cannot be removed nor what comes after the commit is a failure.
        assert (failure is None) == (number > renamed + 1 or point == "unlink latest.tmp"), point
        assert failure is None or not list(folder.glob("step_*.tmp"))  # a full disk is not kept full
        self.check(folder, self.scene.new if failure is None or renamed < number else self.scene.old)

    def fresh(self) -> Path:
        """The folder as it was before."""
        folder = self.scratch / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(self.template, folder))

    def check(self, folder: Path, expected: int) -> None:
        """Ranks of another layout load what is expected, bit for bit; nothing else that bears a final name is torn,
        unless it was before; the next save succeeds, and tidies up."""
        aside = self.scene.action.what == "load"
        restored = load_newest(folder, self.engine, None)
        assert restored.state.step == expected
        assert self.engine.differences(expected) == []
        assert aside or not restored.passed_over
        for checkpoint in list_checkpoints(folder):
            assert self.engine.differences(load_checkpoint(checkpoint, self.engine).step) == []
        save_checkpoint(folder, self.engine, self.engine.become(9), self.engine.config, None, None)
        assert names_in(folder) == ["latest", f"step_{expected:08d}", "step_00000009"]
        assert self.engine.differences(load_newest(folder, self.engine, None).state.step) == []


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[[Name, int], Sweep]:
    """Make a sweep of a scene."""
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"a tokenizer's file")
    return lambda name, world: Sweep(scene(name, tmp_path / name, tokenizer, world), tmp_path)


def test_the_points_are_those_of_a_save(sweep: Callable[[Name, int], Sweep]) -> None:
    """None of the moments that matter is missing, and they come in the order on which the promise rests."""
    first, second = sweep("save", 2).points
    print(*first, *second, sep="\n")
    scratch, final = "step_00000003.tmp", "step_00000003"
    order = [
        f"rmdir {scratch}",  # what an earlier save had left
        "unlink latest.tmp",
        f"mkdir {scratch}",
        f"open {scratch}/rank-00000.safetensors",
        f"write {scratch}/rank-00000.safetensors",
        f"write the rest of {scratch}/rank-00000.safetensors",
        f"fsync {scratch}/rank-00000.safetensors",
        f"open {scratch}/tokenizer.model",
        f"write the rest of {scratch}/tokenizer.model",
        f"fsync {scratch}/tokenizer.model",
        f"open {scratch}/index.json.tmp",
        f"write the rest of {scratch}/index.json.tmp",
        f"fsync {scratch}/index.json.tmp",
        f"replace {scratch}/index.json.tmp {scratch}/index.json",
        f"fsync {scratch}",
        f"replace {scratch} {final}",
        "fsync .",
        "open latest.tmp",
        "replace latest.tmp latest",
        "replace step_00000001 step_00000001.tmp",
        "rmdir step_00000001.tmp",
        "replace step_00000002.damaged step_00000002.damaged.tmp",
        "rmdir step_00000002.damaged.tmp",
    ]
    remaining = iter(first)
    assert [point for point in order if point not in remaining] == []
    verbs = ["open", *["write", "write the rest of"] * 3, "fsync"]
    assert second == [f"{verb} {scratch}/rank-00001.safetensors" for verb in verbs]


@pytest.mark.parametrize("name", ["save", "again", "aside"])
def test_one_rank(sweep: Callable[[Name, int], Sweep], name: Name) -> None:
    swept = sweep(name, 1)
    for number in range(len(swept.points[0])):
        assert swept.kill(Kill(0, number)) == [SIGKILLED]


def test_one_of_two_ranks(sweep: Callable[[Name, int], Sweep]) -> None:
    """The other one lives on, and is told; or has seen it committed, when the first one only tidies up."""
    swept = sweep("save", 2)
    durable = swept.points[0].index(swept.scene.commit) + 1
    for rank, number in _all_points(swept):
        codes = [LOST_A_PEER, LOST_A_PEER]
        codes[rank] = SIGKILLED
        if rank == 0 and number > durable:
            codes[1] = 0
        assert swept.kill(Kill(rank, number)) == codes, swept.points[rank][number]


def test_both_ranks_at_once(sweep: Callable[[Name, int], Sweep]) -> None:
    """Once it has seen the commit, the second one may have ended in peace while the first one tidied up."""
    swept = sweep("save", 2)
    durable = swept.points[0].index(swept.scene.commit) + 1
    for rank, number in _all_points(swept):
        codes = swept.kill(Kill(rank, number, "all"))
        may_have_ended = rank == 0 and number > durable
        assert codes == [SIGKILLED, SIGKILLED] or (may_have_ended and codes == [SIGKILLED, 0]), codes


def test_an_error_at_each_point(sweep: Callable[[Name, int], Sweep]) -> None:
    """It is told; a save that failed leaves nothing behind, one that is committed stays so."""
    swept = sweep("save", 1)
    for number in range(len(swept.points[0])):
        swept.fail(number)


def _all_points(swept: Sweep) -> Iterator[tuple[int, int]]:
    """(rank, number)"""
    for rank, points in enumerate(swept.points):
        for number in range(len(points)):
            yield rank, number
