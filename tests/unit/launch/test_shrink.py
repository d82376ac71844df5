"""Shrinking a recipe: whatever full layout is possible, the rehearsal is, and what layouts depend on is as it was."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.run_folder import recipe_path
from launch.shrink import (
    MOST_RANKS,
    PHASE_STEPS,
    STEPS,
    VOCABULARY,
    fewest_ranks,
    full_layout_config,
    plain_config,
    rehearsal_config,
    rehearsal_layout,
)
from model.config import ModelConfig, has_experts, padded_vocab_size
from pretrain.config import RunConfig
from pretrain.data_plan import timeline
from pretrain.data_stages import Place, batches
from pretrain.deepspeed_config import deepspeed_config
from pretrain.layout import Layout, batch_sizes, check_layout, micro_batches
from pretrain.recipe import load_config, merged, validated
from pretrain.resume_policy import changes
from pretrain.schedule import finished
from pretrain.sequence_parallel import key_value_copies

DEGREES = st.sampled_from([1, 2, 3, 4, 6, 8, 16])


def recipe(name: str, *overrides: str) -> RunConfig:
    return load_config(recipe_path(name), overrides)


@st.composite
def models(draw: st.DrawFn, T: int, S: int, E: int) -> dict[str, Any]:
    """A model that tensor, sequence and expert parallelism of these degrees can split."""
    if T > 1 and draw(st.booleans()):  # fewer key and value heads than ranks
        kv_copies = draw(st.sampled_from([n for n in range(2, T + 1) if T % n == 0]))
        kv_heads, per_kv_head = T // kv_copies, kv_copies * S * draw(st.integers(1, 2))
    else:
        kv_heads = T * draw(st.integers(1, 4))
        per_kv_head = S // math.gcd(S, kv_heads // T) * draw(st.integers(1, 3))
    model = {
        "hidden_size": 8 * draw(st.integers(1, 100)),
        "num_layers": draw(st.integers(1, 9)),
        "num_kv_heads": kv_heads,
        "num_heads": kv_heads * per_kv_head,
        "head_size": 2 * draw(st.integers(1, 64)),
        "ffn_size": T * draw(st.integers(1, 200)),
        "vocab_size": math.lcm(128, T) * draw(st.integers(1, 9)) - draw(st.integers(0, 127)),
        "tie_embeddings": draw(st.booleans()),
        "document_mask": draw(st.booleans()),
    }
    if E == 1 and draw(st.booleans()):
        return {**model, "moe": None}
    groups = draw(st.integers(1, 4))
    experts = math.lcm(E, groups) * draw(st.integers(1, 4))
    groups_per_token = draw(st.integers(1, groups))
    return {
        **model,
        "moe": {
            "experts": experts,
            "groups": groups,
            "groups_per_token": groups_per_token,
            "experts_per_token": draw(st.integers(1, groups_per_token * (experts // groups))),
            "normalize_weights": False,
            "expert_ffn_size": math.lcm(8, T) * draw(st.integers(1, 20)),
            "shared_experts": draw(st.integers(0, 2)),
            "first_layer": draw(st.integers(0, model["num_layers"] - 1)),
            "layer_frequency": draw(st.integers(1, 4)),
        },
    }


@st.composite
def runs(draw: st.DrawFn) -> tuple[RunConfig, int]:
    """A recipe, and a number of ranks that can run it."""
    T, S, E = draw(DEGREES), draw(DEGREES), draw(DEGREES)
    world = math.lcm(T * S, E) * draw(st.sampled_from([1, 2, 3, 32]))
    share = draw(st.integers(1, 3)) * world // (T * S)
    length = T * S * draw(st.integers(1, 40))
    micro = share // (world // (T * S))
    sizes = [share * draw(st.integers(1, 9)) for _ in range(draw(st.integers(1, 3)))]
    unit = draw(st.sampled_from(["steps", "tokens"]))
    name = draw(st.sampled_from(["cosine", "wsd", "constant"]))
    changed = {
        "model": draw(models(T, S, E)),
        "data": {"sequence_length": length},
        "batch": {
            "global_batch_size": sizes[-1],
            "micro_batch_size": micro,
            "ramp": [[10**6 * (i + 1), size] for i, size in enumerate(sizes[:-1])],
        },
        "parallel": {
            "tensor": T,
            "sequence": S,
            "expert": E,
            "zero_stage": draw(st.integers(0, 2)),
            "activation_checkpointing": draw(st.sampled_from(["none", "selective", "full"])),
            "activation_checkpointing_every": draw(st.integers(1, 5)),
        },
        "precision": "fp32",
    }
    tree = merged(recipe("58m").model_dump(mode="json"), changed)
    tree["schedule"] = {
        "name": name,
        f"warmup_{unit}": draw(st.sampled_from([0, 1000])),
        f"total_{unit}": 10**9,
        **({f"decay_{unit}": 5000} if name == "wsd" else {}),
    }
    config = validated(tree)
    check_layout(config, world)
    return config, world


def check_relations(config: RunConfig, small: RunConfig, full: Layout, layout: Layout) -> None:
    """Everything that says how a model falls on ranks, in the run and in what stands for it."""
    a, b = config.model, small.model
    assert a.num_heads // a.num_kv_heads == b.num_heads // b.num_kv_heads
    assert layout.kv_copies == math.gcd(full.kv_copies, layout.tensor)
    assert Layout.of(small, layout.world) == layout
    if (full.tensor, full.sequence) == (layout.tensor, layout.sequence):
        assert ulysses_copies(a, full) == ulysses_copies(b, layout)
        assert (a.num_kv_heads > full.tensor) >= (b.num_kv_heads > layout.tensor)
    assert (a.tie_embeddings, a.document_mask) == (b.tie_embeddings, b.document_mask)
    assert padded_vocab_size(a.vocab_size) - a.vocab_size == padded_vocab_size(b.vocab_size) - b.vocab_size
    assert kinds(a) == kinds(b)
    for key in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_size", "ffn_size"):
        assert getattr(b, key) <= getattr(a, key), key
    assert (a.moe is None) == (b.moe is None)
    if a.moe is not None and b.moe is not None:
        assert b.moe.experts <= a.moe.experts
        assert (a.moe.experts == a.moe.experts_per_token) == (b.moe.experts == b.moe.experts_per_token)
        assert min(2, a.moe.experts // full.expert) <= b.moe.experts // layout.expert
        assert min(2, a.moe.experts // a.moe.groups) <= b.moe.experts // b.moe.groups
        kept = ("experts_per_token", "groups", "groups_per_token", "shared_experts", "router", "balance")
        assert all(getattr(a.moe, key) == getattr(b.moe, key) for key in kept)
        assert b.moe.shared_experts * b.moe.expert_ffn_size % layout.tensor == 0
    assert small.parallel.zero_stage == config.parallel.zero_stage
    assert small.parallel.activation_checkpointing == config.parallel.activation_checkpointing


def ulysses_copies(model: ModelConfig, layout: Layout) -> int:
    kv_heads = max(1, model.num_kv_heads // layout.tensor)
    return key_value_copies(kv_heads, layout.sequence)


def kinds(model: ModelConfig) -> set[bool]:
    return {has_experts(model, layer) for layer in range(model.num_layers)}


@given(run=runs())
@settings(max_examples=150)
def test_a_possible_run_has_a_possible_rehearsal(run: tuple[RunConfig, int]) -> None:
    config, world = run
    full = Layout.of(config, world)
    small, ranks = rehearsal_config(config, world)
    layout = Layout.of(small, ranks)
    assert layout == rehearsal_layout(config, world)
    assert ranks <= min(MOST_RANKS, world)
    degrees = (full.tensor, full.sequence, full.expert)
    exact = (layout.tensor, layout.sequence, layout.expert) == degrees
    assert exact == (math.lcm(full.tensor * full.sequence, full.expert) <= MOST_RANKS)
    if exact and full.data > 1 and 2 * full.tensor * full.sequence <= MOST_RANKS and layout.expert <= 2:
        assert layout.data > 1
    assert all(a % b == 0 for a, b in zip(degrees, (layout.tensor, layout.sequence, layout.expert), strict=True))
    check_relations(config, small, full, layout)
    deepspeed_config(small, layout.data)
    check_layout(plain_config(small), 1)


@given(run=runs())
@settings(max_examples=50)
def test_the_full_layout_is_tried_as_it_is(run: tuple[RunConfig, int]) -> None:
    config, world = run
    small = full_layout_config(config, world)
    full = Layout.of(config, world)
    check_relations(config, small, full, full)


@given(run=runs())
@settings(max_examples=50)
def test_a_rehearsal_takes_the_same_phases(run: tuple[RunConfig, int]) -> None:
    """Six steps, whatever they are counted in; the ramp's first stage and warm-up in two; as much accumulation."""
    config, world = run
    small, ranks = rehearsal_config(config, world)
    tokens, sizes = 0, []
    for (_, size), step in zip(batches(timeline(small, [], Place(), (), {}), Place(), ()), range(STEPS), strict=False):
        assert not finished(small.schedule, step, tokens)
        sizes.append(size)
        tokens += size * small.data.sequence_length
    assert finished(small.schedule, STEPS, tokens)
    first = config.batch.ramp[0][1] if config.batch.ramp else config.batch.global_batch_size
    last = config.batch.global_batch_size
    order = (sizes[0] > sizes[-1]) - (sizes[0] < sizes[-1])
    assert order == (first > last) - (first < last)
    assert sizes == [sizes[0]] * PHASE_STEPS + [sizes[-1]] * (STEPS - PHASE_STEPS)
    assert bool(small.schedule.warmup) == bool(config.schedule.warmup)
    assert (small.schedule.name, small.schedule.counts_tokens) == (config.schedule.name, config.schedule.counts_tokens)
    assert (small.schedule.decay is None) == (config.schedule.decay is None)
    full, layout = Layout.of(config, world), Layout.of(small, ranks)
    for size, its_size in ((first, sizes[0]), (last, sizes[-1])):
        accumulates = micro_batches(config, size, full.data) > 1
        assert not accumulates or micro_batches(small, its_size, layout.data) > 1
    assert (small.batch.micro_batch_size > 1) == (config.batch.micro_batch_size > 1)
    assert max(batch_sizes(small)) <= 2 * 3 * layout.data


@pytest.mark.parametrize(
    ("overrides", "world", "expected"),
    [
        ((), 512, Layout(2)),
        (("parallel.tensor=2",), 512, Layout(4, tensor=2)),
        (("parallel.tensor=8",), 512, Layout(8, tensor=8)),
        (("parallel.tensor=4",), 4, Layout(4, tensor=4)),  # nothing is parallel in data
        (("parallel={tensor: 8, sequence: 2}",), 512, Layout(8, tensor=2, sequence=2)),  # and data 2, as there is there
        (("parallel.tensor=16",), 512, Layout(8, tensor=4, kv_copies=2)),  # of 8 key and value heads
        (("parallel.expert=8",), 512, Layout(8, expert=8)),
        (("parallel={tensor: 4, expert: 16}",), 512, Layout(8, tensor=4, expert=8)),
        (("parallel={tensor: 2, sequence: 2, expert: 2}",), 512, Layout(8, tensor=2, sequence=2, expert=2)),
    ],
)
def test_which_ranks_rehearse(overrides: tuple[str, ...], world: int, expected: Layout) -> None:
    moe = "model.moe={experts: 64, experts_per_token: 4, expert_ffn_size: 512}"
    config = recipe("70b", "parallel.zero_stage=1", moe, *overrides)
    assert rehearsal_layout(config, world) == expected


def test_what_stays_is_not_changed() -> None:
    """The differences of a large recipe are sizes and lengths, nothing else: even of its heads it needs all."""
    config = recipe("70b", "parallel={tensor: 4, compile: true, offload_optimizer: cpu}", "optimizer.z_loss=1e-4")
    small, _ = rehearsal_config(config, 512)
    assert set(changes(config, small)) == {
        *("batch.global_batch_size", "batch.ramp", "checkpoint.every_steps", "data.sequence_length"),
        *(f"evaluation.{key}" for key in ("every_steps", "sources", "windows")),
        *(f"model.{key}_size" for key in ("ffn", "head", "hidden", "vocab")),
        *("model.num_layers", "parallel.compile", "schedule.total_tokens", "schedule.warmup_tokens"),
    }


def test_the_vocabulary_of_real_data_stays() -> None:
    assert rehearsal_config(recipe("1b"), 8, keep_vocabulary=True)[0].model.vocab_size == 128256
    assert VOCABULARY <= rehearsal_config(recipe("1b"), 8)[0].model.vocab_size < 2 * VOCABULARY


def test_held_out_data_that_a_run_does_not_use_is_left_alone() -> None:
    config = recipe("demo", "evaluation.every_steps=0")
    assert rehearsal_config(config, 2)[0].evaluation.sources == config.data.sources
    assert rehearsal_config(recipe("demo"), 2)[0].evaluation.sources == config.evaluation.sources


def test_deepspeed_settings_go_along_unless_they_repeat_the_recipe() -> None:
    settings = "{gradient_accumulation_steps: 32, zero_optimization: {stage: 3, reduce_bucket_size: 1000}}"
    config = recipe("70b", "batch.ramp=[]", f"deepspeed={settings}")
    small, _ = rehearsal_config(config, 32)
    assert small.deepspeed == {"zero_optimization": {"reduce_bucket_size": 1000}}


def test_the_fewest_ranks() -> None:
    assert fewest_ranks(recipe("58m")) == 1
    moe = "model.moe={experts: 12, experts_per_token: 2, expert_ffn_size: 16}"
    assert fewest_ranks(recipe("58m", moe, "parallel={tensor: 4, sequence: 2, expert: 6}")) == 24


@pytest.mark.parametrize("act", [rehearsal_config, full_layout_config])
def test_an_impossible_layout_is_refused(act: Any) -> None:
    with pytest.raises(ValueError, match=r"parallel.tensor=3 does not divide model.num_heads=64: use one of 1, 2"):
        act(recipe("70b", "parallel.tensor=3"), 6)
    with pytest.raises(ValueError, match="does not divide 6 ranks: use a multiple of 4 ranks"):
        act(recipe("70b", "parallel.tensor=4"), 6)
