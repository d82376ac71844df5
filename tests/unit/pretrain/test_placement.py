"""Placement: the boxes of all ranks make up every parameter of any possible layout, and shards compute what the whole
does."""

import copy
import math
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.decoder import Decoder
from model.init import initialise
from model.parameters import buffer_shapes, is_expert, parameter_shapes
from pretrain.boxes import Box, Index, slices
from pretrain.config import RunConfig
from pretrain.layout import Layout
from pretrain.parallel_dims import ParallelDims
from pretrain.parallelize import placements
from pretrain.placement import TENSOR_PLAN, Placement, holders, kept_beside_zero, placement
from tests.small_run import small_config

EVERYTHING = (
    "model={qk_norm: true, tie_embeddings: false, num_heads: 8}",
    "model.moe={experts: 12, experts_per_token: 2, expert_ffn_size: 24, shared_experts: 1, first_layer: 1, "
    "balance: bias}",
)


@st.composite
def possible(draw: st.DrawFn) -> tuple[RunConfig, int]:
    """A model, and degrees and a number of ranks that it can be split over."""
    tensor, sequence = draw(st.sampled_from([1, 2, 3, 4, 6, 8])), draw(st.sampled_from([1, 2, 3, 4]))
    kv_heads = draw(st.sampled_from([n for n in range(1, 2 * tensor + 1) if n % tensor == 0 or tensor % n == 0]))
    heads = math.lcm(tensor * sequence, kv_heads) * draw(st.integers(1, 2))
    moe, expert = "null", 1
    if draw(st.booleans()):
        shared, balance = draw(st.integers(0, 2)), draw(st.sampled_from(["bias", "aux_loss"]))
        moe = f"{{experts: 12, experts_per_token: 2, expert_ffn_size: 24, shared_experts: {shared}, first_layer: 1, "
        moe += f"balance: {balance}}}"
        expert = draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    world = math.lcm(tensor * sequence, expert) * draw(st.integers(1, 2))
    qk_norm, tied = draw(st.booleans()), draw(st.booleans())
    config = small_config(
        f"model={{num_heads: {heads}, num_kv_heads: {kv_heads}, head_size: 2, hidden_size: 8}}",
        f"model={{qk_norm: {qk_norm}, tie_embeddings: {tied}, moe: {moe}}}",
        f"data.sequence_length={2 * tensor * sequence}",
        f"batch={{global_batch_size: {world}, micro_batch_size: 1}}",
        f"parallel={{tensor: {tensor}, sequence: {sequence}, expert: {expert}}}",
    )
    return config, world


def times_held(places: Iterable[Placement], shape: Index) -> np.ndarray:
    """How many of these hold each element."""
    held, whole = np.zeros(shape, dtype=int), Box((0,) * len(shape), shape)
    for place in places:
        held[slices(place.box, whole)] += 1
    return held


@given(case=possible())
@settings(max_examples=25)
def test_ranks_hold_every_element_as_often_as_they_say(case: tuple[RunConfig, int]) -> None:
    """`copies` times `replicas` are the ranks that hold a box, all of them; the first of each write all, once; so do
    the ranks of every group that splits the parameter, those that hold copies of another's box left out."""
    config, world = case
    layout = Layout.of(config, world)
    for name, shape in (parameter_shapes(config.model) | buffer_shapes(config.model)).items():
        places = [placement(name, shape, layout, rank) for rank in range(world)]
        ranks_of: dict[Box, set[int]] = defaultdict(set)
        for rank, place in enumerate(places):
            ranks_of[place.box].add(rank)
        assert sorted(holders(name, shape, layout)) == sorted(map(sorted, ranks_of.values())), name
        firsts, writers = [], []
        for rank, place in enumerate(places):
            copies = layout.group_of(rank, place.copies) if place.copies else range(rank, rank + 1)
            said = [other for copy in copies for other in layout.group_of(copy, place.replicas)]
            assert len(said) == len(set(said)), name
            assert set(said) == ranks_of[place.box], name
            if copies.start == rank:
                firsts.append(rank)
                writers += [rank] if layout.group_of(rank, place.replicas).start == rank else []
        assert (times_held((places[rank] for rank in writers), shape) == 1).all(), name
        for group in layout.groups("expert" if is_expert(name) and layout.expert > 1 else "tensor"):
            assert (times_held((places[rank] for rank in firsts if rank in group), shape) == 1).all(), name


def test_there_is_a_plan_for_every_name_and_no_other() -> None:
    config = small_config(*EVERYTHING, "parallel={tensor: 4, expert: 2}", "model.num_kv_heads=2").model
    names = parameter_shapes(config) | buffer_shapes(config)
    layout = Layout(8, tensor=4, expert=1, kv_copies=2)
    assert placements(config, ParallelDims(layout, 5, {})).keys() == names.keys()
    assert {".".join(name.split(".")[-2:]) for name in names} == TENSOR_PLAN.keys()


def test_what_has_no_plan_is_not_replicated() -> None:
    for name in ("layers.0.self_attn.gate.weight", "layers.0.self_attn.q_proj.bias", "bias"):
        with pytest.raises(AssertionError, match=f"tensor parallelism has no plan for {name}"):
            placement(name, (8, 8), Layout(2, tensor=2), 0)
        assert placement(name, (8, 8), Layout(2), 0).box == Box((0, 0), (8, 8))


def test_what_does_not_split_evenly_is_not_split() -> None:
    with pytest.raises(AssertionError, match="does not split into 4 along dimension 1"):
        placement("layers.0.mlp.down_proj.weight", (8, 6), Layout(4, tensor=4), 0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_shards_of_attention_and_mlp_add_up_to_the_whole(kv_heads: int) -> None:
    """The sum over tensor-parallel ranks that `tensor_parallel.scatter_sequence` takes, here in one process. Query
    heads find their own key and value heads, whether ranks have several of these or share one."""
    config = small_config(*EVERYTHING, f"model.num_kv_heads={kv_heads}", "parallel.tensor=4")
    layout, decoder = Layout.of(config, 4), Decoder(config.model)
    initialise(decoder, 0)
    x_BTD = torch.randn(2, 6, config.model.hidden_size, generator=torch.Generator().manual_seed(0))
    rotary = decoder.rotary(torch.arange(6))
    for path, inputs in (
        ("layers.0.self_attn", (x_BTD, *rotary)),
        ("layers.0.mlp", (x_BTD,)),
        ("layers.1.mlp.shared_experts", (x_BTD,)),
    ):
        whole = decoder.get_submodule(path)
        parts = [shard(whole, path, layout, rank)(*inputs) for rank in range(4)]
        assert sum(part.abs().max() > 1e-4 for part in parts) == 4
        torch.testing.assert_close(torch.stack(parts).sum(0), whole(*inputs), rtol=1e-5, atol=1e-6)


def shard(whole: nn.Module, path: str, layout: Layout, rank: int) -> nn.Module:
    """A rank's part of a module."""
    module = copy.deepcopy(whole)
    for name, parameter in module.named_parameters():
        place = placement(f"{path}.{name}", tuple(parameter.shape), layout, rank)
        parameter.data = parameter.data[slices(place.box, Box((0,) * parameter.dim(), place.shape))]
    return module


def test_experts_are_split_whole_and_routers_not_at_all() -> None:
    layout = Layout(8, tensor=2, expert=4)
    for rank in range(8):
        experts = placement("layers.0.mlp.experts.up_proj", (12, 24, 8), layout, rank)
        assert experts.box == Box((rank % 4 * 3, 0, 0), (3, 24, 8))
        assert (experts.copies, experts.replicas) == (None, "expert_data")
        router = placement("layers.0.mlp.router.weight", (12, 8), layout, rank)
        assert router.box == Box((0, 0), (12, 8))
        assert (router.copies, router.replicas) == ("tensor", "token")


@pytest.mark.parametrize("zero_stage", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_routers_lie_beside_zero_3_where_their_dtype_differs(precision: str, zero_stage: int) -> None:
    config = small_config(*EVERYTHING, f"precision={precision}", f"parallel.zero_stage={zero_stage}")
    beside = [name for name in parameter_shapes(config.model) if kept_beside_zero(name, config)]
    assert beside == (["layers.1.mlp.router.weight"] if (precision, zero_stage) == ("bf16", 3) else [])
