"""Layouts as arithmetic: groups tile the ranks, each sample is read once, what cannot be is refused with a remedy."""

import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loader import Loader
from data_pipeline.order import Stage
from pretrain.layout import AXES, Axis, Layout, check_layout, micro_batches
from tests.conftest import Corpus
from tests.small_run import MODELS, small_config

DEGREES = st.integers(1, 8)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any layout whose degrees divide its ranks, of up to a few hundred ranks."""
    tensor, sequence, expert = draw(DEGREES), draw(DEGREES), draw(DEGREES)
    world = math.lcm(tensor * sequence, expert) * draw(st.integers(1, 3))
    kv_copies = draw(st.sampled_from([n for n in range(1, tensor + 1) if tensor % n == 0]))
    return Layout(world, tensor, sequence, expert, kv_copies)


SMALL = [
    Layout(world, tensor, sequence, expert, kv_copies)
    for world in (1, 2, 4, 6, 8, 12, 16)
    for tensor, sequence, expert, kv_copies in itertools.product((1, 2, 3, 4, 8), repeat=4)
    if world % (tensor * sequence) == 0 and world % expert == 0 and tensor % kv_copies == 0
]


def check_groups(layout: Layout) -> None:
    """Every property of a layout's groups, over all ranks and axes."""
    ranks = range(layout.world)
    places = [layout.coordinates(rank) for rank in ranks]
    degrees = (layout.data, layout.sequence, layout.tensor)
    assert places == list(itertools.product(*map(range, degrees)))  # a bijection, tensor-parallel ranks side by side
    for axis in AXES:
        groups = list(layout.groups(axis))
        assert sorted(itertools.chain(*groups)) == list(ranks), axis  # each rank is in one group
        assert len({len(group) for group in groups}) == 1, axis
        for group in groups:
            assert all(layout.group_of(rank, axis) == group for rank in group), axis
    check_tiling(layout, "tensor", "token")
    check_tiling(layout, "expert", "expert_data")
    for rank, (data, sequence, tensor) in enumerate(places):
        same: dict[
            Axis, Callable[[int, int, int], bool]
        ] = {  # which coordinates the ranks of a group share: the groups mean what their names say
            "tensor": lambda d, s, t: (d, s) == (data, sequence),  # noqa: B023
            "sequence": lambda d, s, t: (d, t) == (data, tensor),  # noqa: B023
            "sample": lambda d, s, t: d == data,  # noqa: B023
            "token": lambda d, s, t: t == tensor,  # noqa: B023
            "kv_head": lambda d, s, t: (d, s, t // layout.kv_copies) == (data, sequence, tensor // layout.kv_copies),  # noqa: B023
        }
        for axis, holds in same.items():
            assert list(layout.group_of(rank, axis)) == [r for r in ranks if holds(*places[r])], axis


def check_tiling(layout: Layout, a: Axis, b: Axis) -> None:
    """Any group of the one axis meets any group of the other in exactly one rank, and together they reach all."""
    assert len(layout.group_of(0, a)) * len(layout.group_of(0, b)) == layout.world
    meetings = Counter((layout.group_of(r, a).start, layout.group_of(r, b).start) for r in range(layout.world))
    assert set(meetings.values()) == {1}
    assert len(meetings) == layout.world


def test_groups_of_every_small_layout() -> None:
    assert len(SMALL) > 200
    for layout in SMALL:
        check_groups(layout)


@given(layout=layouts())
@settings(max_examples=25)
def test_groups_of_any_layout(layout: Layout) -> None:
    check_groups(layout)


def check_samples(layout: Layout) -> None:
    """Each share of a global batch is read by the ranks of one sample group, all of them, and by no other rank."""
    readers: dict[int, list[int]] = {}
    for rank in range(layout.world):
        data, _, _ = layout.coordinates(rank)
        readers.setdefault(data, []).append(rank)
    assert sorted(readers) == list(range(layout.data))
    assert [list(group) for group in layout.groups("sample")] == [readers[data] for data in range(layout.data)]


@given(layout=layouts())
@settings(max_examples=50)
def test_every_sample_is_read_by_one_sample_group(layout: Layout) -> None:
    check_samples(layout)


@pytest.mark.parametrize(
    ("world", "tensor", "sequence", "expert"),
    [(1024, 8, 4, 64), (1024, 8, 1, 1), (1024, 1, 16, 32), (16384, 8, 4, 64), (16384, 16, 8, 256), (16384, 1, 1, 128)],
)
def test_layouts_of_a_cluster(world: int, tensor: int, sequence: int, expert: int) -> None:
    """Coordinates of all ranks, and the groups of all, at the sizes that this is for."""
    layout = Layout(world, tensor, sequence, expert, kv_copies=max(1, tensor // 8))
    check_samples(layout)
    places = {layout.coordinates(rank) for rank in range(world)}
    assert len(places) == world
    assert max(places) == (world // (tensor * sequence) - 1, sequence - 1, tensor - 1)
    for axis in AXES:
        groups = list(layout.groups(axis))
        assert len(groups) * len(groups[0]) == world
        assert len(set(itertools.chain(*groups))) == world, axis
    check_tiling(layout, "tensor", "token")
    check_tiling(layout, "expert", "expert_data")


@pytest.mark.slow
def test_loaders_of_all_ranks_read_each_sample_once(corpus: Corpus) -> None:
    """The real loader, told what each rank of a layout tells it: 8 ranks, of which 4 read the same."""
    config = small_config(*corpus.settings()[1::2], "parallel={tensor: 2, sequence: 2}", "batch.micro_batch_size=2")
    layout = Layout.of(config, 8)

    def read(data_rank: int, data_world: int) -> list[list[int]]:
        plan = iter([(0, 8), (8, 8)])
        loader = Loader(
            config.data,
            0,
            [Stage(0, {"code": 1.0}, config.data.sequence_length)],
            data_rank,
            data_world,
            2,
            False,
            plan,
        )
        return [row for batches in loader for batch in batches for row in batch.tokens.tolist()]

    everything = read(0, 1)
    found = {rank: read(layout.coordinates(rank)[0], layout.data) for rank in range(layout.world)}
    for group in layout.groups("sample"):
        assert all(found[rank] == found[group.start] for rank in group)
    once = [row for group in layout.groups("sample") for row in found[group.start]]
    assert sorted(once) == sorted(everything)
    assert len(once) == 16


@given(layout=layouts(), micro=st.integers(1, 4), count=st.integers(1, 5))
def test_micro_batches_make_up_the_global_batch(layout: Layout, micro: int, count: int) -> None:
    size = layout.data * micro * count
    config = small_config(f"batch={{global_batch_size: {size}, micro_batch_size: {micro}}}")
    assert micro_batches(config, size, layout.data) == count
    with pytest.raises(ValueError, match=f"data.stages: global_batch_size={size + 1} is not a multiple of"):
        micro_batches(config, size + 1, layout.data * (size + 2))  # more ranks than samples


@pytest.mark.parametrize(("world", "fits"), [(1, True), (2, True), (4, True), (3, False), (8, False)])
def test_the_batch_divides_over_ranks(world: int, fits: bool) -> None:
    if fits:
        check_layout(small_config(), world)
        return
    with pytest.raises(ValueError, match="is not a multiple of batch.micro_batch_size=2") as caught:
        check_layout(small_config(), world)
    assert ("use fewer ranks" if world == 3 else "micro_batch_size may be 1") in str(caught.value)


MOE = f"model.moe={MODELS['moe']}"
# What is asked for, the ranks there are, and what the refusal says: the value, the rule, the remedy.
REFUSED = {
    "heads": (("parallel.tensor=8",), 8, "parallel.tensor=8 does not divide model.num_heads=4: use one of 1, 2, 4"),
    "ffn": (
        ("model.num_heads=12", "model.head_size=4", "model.num_kv_heads=12", "parallel.tensor=3", "model.ffn_size=50"),
        3,
        "parallel.tensor=3 does not divide model.ffn_size=50: use one of 1, 2",
    ),
    "vocabulary": (
        ("model.num_heads=6", "model.head_size=8", "model.num_kv_heads=6", "model.vocab_size=128", "parallel.tensor=3"),
        3,
        "parallel.tensor=3 does not divide model.vocab_size (padded)=128: use one of 1, 2",
    ),
    "shared experts": (
        (
            "model={num_heads: 16, head_size: 4, num_kv_heads: 16, ffn_size: 64}",
            "model.moe={experts: 4, experts_per_token: 2, expert_ffn_size: 8, shared_experts: 1}",
            "parallel.tensor=16",
        ),
        16,
        "parallel.tensor=16 does not divide model.moe.shared_experts * expert_ffn_size=8: use one of 1, 2, 4, 8",
    ),
    "kv heads": (
        ("model.num_heads=12", "model.head_size=4", "model.num_kv_heads=6", "parallel.tensor=4"),
        4,
        "parallel.tensor=4 neither divides model.num_kv_heads=6 nor is a multiple of it",
    ),
    "query heads": (
        ("parallel={tensor: 2, sequence: 4}",),
        8,
        "parallel.sequence=4 does not divide the 2 query heads that parallel.tensor=2 leaves each rank",
    ),
    "sequence": (
        ("parallel={tensor: 2, sequence: 2}", "data.sequence_length=22"),
        4,
        "parallel.sequence=2 does not go with data.sequence_length=22, which parallel.tensor=2 times "
        "parallel.sequence=2 split and which is to be a multiple of 4: use 1",
    ),
    "no experts": (("parallel.expert=2",), 2, "model.moe is not set: use 1"),
    "experts": (
        (MOE, "parallel.expert=3"),
        3,
        "parallel.expert=3 does not divide model.moe.experts=4: use one of 1, 2",
    ),
    "ranks a sample": (
        ("parallel={tensor: 2, sequence: 2}",),
        6,
        "parallel.tensor=2 times parallel.sequence=2 does not divide 6 ranks: use a multiple of 4 ranks",
    ),
    "ranks an expert group": (
        (MOE, "parallel.expert=4"),
        2,
        "parallel.expert=4 does not divide 2 ranks: use a multiple",
    ),
    "batch": ((), 8, "batch.global_batch_size=8 is not a multiple of batch.micro_batch_size=2 times 8 data-parallel"),
    "ramp": (("batch.ramp=[[100, 6]]",), 2, "batch.ramp: size=6 is not a multiple"),
}


@pytest.mark.parametrize("rule", REFUSED)
def test_an_impossible_layout_is_refused(rule: str) -> None:
    overrides, world, words = REFUSED[rule]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        check_layout(small_config(*overrides), world)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_remedy_of_a_refused_layout_works() -> None:
    check_layout(small_config("parallel.tensor=4"), 4)
    check_layout(small_config("parallel={tensor: 2, sequence: 2}", "data.sequence_length=24"), 4)
    check_layout(small_config(MOE, "parallel.expert=4"), 4)
    assert Layout.of(small_config("parallel.tensor=4", "model.num_kv_heads=1"), 4) == Layout(4, tensor=4, kv_copies=4)
    assert Layout.of(small_config("parallel.tensor=2"), 4).kv_copies == 1
