"""Process groups of a rank, over a fake backend that has as many ranks as one likes and talks to none of them."""

import itertools
import math
import time
from collections.abc import Callable, Iterator

import pytest
import torch
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
    for rank in range(1024):
        start(rank, 1024)
        dims = ParallelDims.of_this_rank(config)
        assert dims.rank == rank
        seen.add((dims.data_rank, dims.index("sequence"), dims.index("tensor")))
    assert len(seen) == 1024


def possible_configs(world: int) -> Iterator[RunConfig]:
    """Every layout of so many ranks, with as few, as many and more key and value heads than tensor-parallel ranks."""
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    for tensor, sequence, expert in itertools.product(divisors, repeat=3):
        if world % (tensor * sequence) or 384 % tensor:
            continue
        for kv_heads in {n for n in (1, 2, tensor, 2 * tensor) if n % tensor == 0 or tensor % n == 0}:
            yield small_config(
                f"model={{num_heads: {math.lcm(tensor * sequence, kv_heads)}, num_kv_heads: {kv_heads}, head_size: 2}}",
                f"model.moe={{experts: {world}, experts_per_token: 2, expert_ffn_size: 16}}",
                f"data.sequence_length={world}",
                f"batch={{global_batch_size: {world}, micro_batch_size: 1}}",
                f"parallel={{tensor: {tensor}, sequence: {sequence}, expert: {expert}}}",
            )


@pytest.mark.parametrize("world", [6, 8, pytest.param(12, marks=pytest.mark.slow)])
def test_ranks_make_their_groups_in_one_order(start: Start, world: int) -> None:
    """Of groups that overlap, the ranks in both make the same one first: NCCL would wait forever otherwise. Each rank
    makes, one after the other, groups of the same sizes and strides."""
    layouts = 0
    for config in possible_configs(world):
        orders = set()
        for rank in range(world):
            start(rank, world)
            ParallelDims.of_this_rank(config)
            made = [dist.get_process_group_ranks(group) for group in dist.distributed_c10d._world.pg_names][1:]
            assert all(rank in ranks and 1 < len(ranks) < world for ranks in made)
            assert len({tuple(ranks) for ranks in made}) == len(made)
            orders.add(tuple((len(ranks), ranks[1] - ranks[0]) for ranks in made))
        assert len(orders) == 1, config.parallel
        layouts += 1
    assert layouts >= 36


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
    mine = torch.ones(2)
    for axis in AXES:
        dims.all_reduce(mine, axis)
    assert mine.tolist() == [1, 1]


def test_ranks_that_cannot_be_laid_out(start: Start) -> None:
    start(0, 6)
    with pytest.raises(ValueError, match="does not divide 6 ranks: use a multiple of 4 ranks"):
        ParallelDims.of_this_rank(small_config("parallel.tensor=4"))
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="does not divide 1 ranks"):
        ParallelDims.of_this_rank(small_config("parallel.tensor=4"))
