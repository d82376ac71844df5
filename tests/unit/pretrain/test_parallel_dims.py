"""Process groups of a rank, over a fake backend that has as many ranks as one likes and talks to none of them."""

import time
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain.config import RunConfig
from pretrain.layout import AXES, Layout
from pretrain.parallel_dims import ParallelDims, gathered
from tests.small_run import MODELS, small_config

Start = Callable[[int, int], None]


@pytest.fixture
def start() -> Iterator[Start]:
    """Make this process a rank of a world; starting another ends the one before."""

    def end() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def become(rank: int, world: int) -> None:
        end()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)

    yield become
    end()


def cluster_config(world: int) -> RunConfig:
    """TP 8 over 4 key and value heads, SP 4, EP 64: 32 ranks a sample."""
    return small_config(
        "model={hidden_size: 512, num_heads: 64, num_kv_heads: 4, ffn_size: 512}",
        f"model.moe={MODELS['moe'].replace('experts: 4', 'experts: 128')}",
        "data.sequence_length=1024",
        f"batch={{global_batch_size: {world // 32}, micro_batch_size: 1}}",
        "parallel={tensor: 8, sequence: 4, expert: 64}",
    )


@pytest.mark.parametrize("world", [1024, 16384])
def test_groups_of_a_cluster(start: Start, world: int) -> None:
    """The groups of a rank have the right members, cost no more than they must, and nobody else's are made."""
    config = cluster_config(world)
    layout = Layout.of(config, world)
    sizes = {"tensor": 8, "sequence": 4, "sample": 32, "token": world // 8, "expert": 64, "kv_head": 2}
    for rank in (0, 1, 8, 37, world // 2 + 5, world - 1):
        start(rank, world)
        begin = time.perf_counter()
        dims = ParallelDims.of_this_rank(config)
        assert time.perf_counter() - begin < 1  # measured: 2 ms at 16,384 ranks
        for axis in AXES:
            group = dims.groups[axis]
            assert group is not None
            assert dist.get_process_group_ranks(group) == list(layout.group_of(rank, axis)), axis
            assert dist.get_rank(group) == dims.index(axis)
            assert group.size() == dims.size(axis) == {**sizes, "expert_data": world // 64}[axis]
        assert (dims.data_rank, dims.data_world) == (rank // 32, world // 32)
        made = dist.distributed_c10d._world.pg_names
        assert len(made) == 1 + len(AXES)  # the world, and one for each axis


def test_every_rank_of_1024_has_its_own_place(start: Start) -> None:
    config = cluster_config(1024)
    seen = set()
    for rank in range(0, 1024, 7):
        start(rank, 1024)
        dims = ParallelDims.of_this_rank(config)
        assert dims.rank == rank
        seen.add((dims.data_rank, dims.index("sequence"), dims.index("tensor")))
    assert len(seen) == len(range(0, 1024, 7))


def test_equal_groups_are_made_once(start: Start) -> None:
    """Where axes coincide they share a group; an axis of one rank has none, and one of all ranks is the world."""
    start(3, 8)
    dims = ParallelDims.of_this_rank(small_config("parallel.tensor=4", "model.num_kv_heads=1"))
    assert dims.groups["sequence"] is dims.groups["expert"] is None
    assert dims.groups["expert_data"] is dist.group.WORLD
    assert dims.groups["tensor"] is dims.groups["sample"] is dims.groups["kv_head"]
    assert len(dist.distributed_c10d._world.pg_names) == 3  # world, tensor, token


def test_one_process_is_a_layout_too() -> None:
    dims = ParallelDims.of_this_rank(small_config())
    assert set(dims.groups.values()) == {None}
    assert (dims.rank, dims.data_rank, dims.data_world) == (0, 0, 1)
    assert all((dims.index(axis), dims.size(axis)) == (0, 1) for axis in AXES)
    assert gathered("mine", None) == ["mine"]


def test_ranks_that_cannot_be_laid_out(start: Start) -> None:
    start(0, 6)
    with pytest.raises(ValueError, match="does not divide 6 ranks: use a multiple of 4 ranks"):
        ParallelDims.of_this_rank(small_config("parallel.tensor=4"))
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="does not divide 1 ranks"):
        ParallelDims.of_this_rank(small_config("parallel.tensor=4"))
