"""Ranks that save and die: processes forked from one that has imported everything, and so cheap to lose."""

import multiprocessing
import os
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Literal

import torch
import torch._dynamo  # an optimizer brings it in: a second for every rank whose parent has not got it
import torch.distributed as dist

from pretrain.checkpoint.load import load_newest
from pretrain.checkpoint.save import CheckpointError, save_checkpoint
from pretrain.device import new_cpu_group
from pretrain.parallel_dims import gathered
from tests.faults.disk import Strike, at, kill, watched
from tests.faults.states import RowsEngine, faults_config

LOST_A_PEER = 3  # exit code of a rank that lives on and sees that the save has failed
SECONDS = 120  # a rank may take, on a busy machine


@dataclass(frozen=True)
class Kill:
    """SIGKILL at a rank's n-th write point: to that rank, or to all at once."""

    rank: int
    number: int
    whom: Literal["one", "all"] = "one"


@dataclass(frozen=True)
class Action:
    """What a set of ranks does with a folder of checkpoints.

    what: save the state of `step`, or load the newest. tokenizer: to save along. counts: where each rank leaves the
    names of its write points, one a line, in a file of its number.
    """

    what: Literal["save", "load"]
    folder: Path
    world: int = 1
    step: int = 0
    tokenizer: Path | None = None
    settings: tuple[str, ...] = ()
    kill: Kill | None = None
    counts: Path | None = None


def act(action: Action, scratch: Path) -> list[int]:
    """Run an action on ranks of its own; returns their exit codes. scratch: a folder to meet in, which may exist."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    meeting = scratch / "meeting"
    meeting.unlink(missing_ok=True)
    ranks = [context.Process(target=_rank, args=(action, rank, meeting)) for rank in range(action.world)]
    for process in ranks:
        process.start()
    return [_exit_code(process) for process in ranks]


def write_points(action: Action, scratch: Path) -> list[list[str]]:
    """The names of each rank's write points in an action, which is carried out."""
    codes = act(replace(action, counts=scratch), scratch)
    assert codes == [0] * action.world
    return [(scratch / str(rank)).read_text().splitlines() for rank in range(action.world)]


def _exit_code(process: ForkServerProcess) -> int:
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"a rank hangs: {process}")
    return process.exitcode


def _rank(action: Action, rank: int, meeting: Path) -> None:
    """One of the ranks, in a process of its own."""
    torch.set_num_threads(1)
    group = None
    if action.world > 1:
        store = dist.FileStore(str(meeting), action.world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=action.world)
        group = new_cpu_group()
    engine = RowsEngine(faults_config(*action.settings), rank, action.world)
    points: list[str] = []
    try:
        with watched(action.folder, _strike(action.kill, rank, group, points)):
            _act(action, engine, group)
    except CheckpointError:
        os._exit(LOST_A_PEER)
    if action.counts is not None:
        (action.counts / str(rank)).write_text("".join(f"{point}\n" for point in points))
    if group is not None:
        dist.destroy_process_group()


def _act(action: Action, engine: RowsEngine, group: dist.ProcessGroup | None) -> None:
    if action.what == "save":
        state = engine.become(action.step)
        save_checkpoint(action.folder, engine, state, engine.config, action.tokenizer, group)
    else:
        step = load_newest(action.folder, engine, group).state.step
        assert engine.differences(step) == []


def _strike(planned: Kill | None, rank: int, group: dist.ProcessGroup | None, points: list[str]) -> Strike:
    """What is to happen at this rank's write points."""
    pids = gathered(os.getpid(), group)
    if planned is not None and planned.rank == rank:
        return at(planned.number, partial(kill, [os.getpid()] if planned.whom == "one" else pids))
    return points.append
