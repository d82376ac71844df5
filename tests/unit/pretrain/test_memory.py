"""Memory of a rank: published figures, exact counts, and DeepSpeed's own constants."""

from pathlib import Path

import pytest

from model.accounting import parameter_counts
from model.parameters import is_norm, parameter_shapes
from pretrain.config import RunConfig
from pretrain.deepspeed_config import reduce_bucket_elements
from pretrain.memory import DEEPSPEED_DEFAULTS, RankMemory, moments, rank_memory
from pretrain.recipe import load_config

RECIPES = Path(__file__).parents[3] / "launch" / "recipes"
EXPERTS = "model.moe={experts: 8, experts_per_token: 2, expert_ffn_size: 11008}"


def recipe(name: str, *overrides: str) -> RunConfig:
    return load_config(RECIPES / f"{name}.yaml", list(overrides))


def at(moment: str, config: RunConfig, world: int) -> RankMemory:
    return next(found for found in moments(config, world) if found.moment == moment)


@pytest.mark.parametrize(("stage", "published"), [(1, 31.4), (2, 16.6), (3, 1.9)])
def test_states_are_those_of_the_zero_paper(stage: int, published: float) -> None:
    """Rajbhandari et al. 2020, arXiv 1910.02054, figure 1: GB of 7.5 B parameters over 64 ranks, with Adam. Gradients
    have 2 bytes there and 4 here."""
    config = recipe("7b", f"parallel.zero_stage={stage}")
    memory = at("step", config, 64)
    states = memory.weights + memory.gradients / 2 + memory.optimizer
    parameters = parameter_counts(config.model)["total"]
    assert states / parameters * 7.5 == pytest.approx(published, abs=0.05)


def test_one_rank_holds_18_bytes_a_parameter() -> None:
    """16 in the ZeRO paper's section 3.1, with gradients in fp16."""
    config = recipe("7b", "parallel.zero_stage=1")
    memory = at("step", config, 1)
    assert (memory.weights + memory.gradients + memory.optimizer) / parameter_counts(config.model)["total"] == 18


def test_fp32_has_masters_from_stage_1_on() -> None:
    parameters = parameter_counts(recipe("7b").model)["total"]
    zero, one = (recipe("7b", "precision=fp32", f"parallel.zero_stage={stage}") for stage in (0, 1))
    assert at("step", zero, 1).optimizer == 8 * parameters
    assert at("step", one, 1).optimizer == 12 * parameters


def test_tensor_parallelism_splits_all_but_norms() -> None:
    config = recipe("70b", "parallel={zero_stage: 1, tensor: 8}", "batch.micro_batch_size=1")
    shapes = parameter_shapes(config.model)
    norms = sum(shape[0] for name, shape in shapes.items() if is_norm(name))
    total = parameter_counts(config.model)["total"]
    assert at("step", config, 64).weights == 2 * ((total - norms) // 8 + norms)


def test_key_and_value_heads_are_repeated_where_there_are_fewer_than_ranks() -> None:
    eight, sixteen = (recipe("70b", f"parallel={{zero_stage: 1, tensor: {degree}}}") for degree in (8, 16))
    shapes = parameter_shapes(eight.model)
    key_values = sum(a * b for name, (a, *rest) in shapes.items() for b in rest if "k_proj" in name or "v_proj" in name)
    norms = sum(shape[0] for name, shape in shapes.items() if is_norm(name))
    halved = at("step", eight, 64).weights - 2 * (norms + key_values // 8)
    assert at("step", sixteen, 64).weights == halved // 2 + 2 * (norms + key_values // 8)


def test_expert_parallelism_splits_experts_alone_and_zero_their_copies() -> None:
    one, eight = (recipe("7b", EXPERTS, f"parallel={{zero_stage: 1, expert: {degree}}}") for degree in (1, 8))
    counts = parameter_counts(one.model)
    dense = counts["total"] - counts["experts"]
    first, last = at("step", one, 64), at("step", eight, 64)
    assert first.weights == 2 * counts["total"] + 2 * counts["router"]
    assert last.weights == 2 * (dense + counts["experts"] // 8) + 2 * counts["router"]
    # 64 ranks of one experts' copy, or 8 groups of 8 of which each has one: the share is the same.
    assert last.optimizer == first.optimizer == 12 * (dense // 64 + counts["experts"] // 64)


def test_muon_keeps_one_moment_of_matrices() -> None:
    adamw, muon = (recipe("7b", "parallel.zero_stage=1", f"optimizer.name={name}") for name in ("adamw", "muon"))
    counts = parameter_counts(adamw.model)
    saved = at("step", adamw, 1).optimizer - at("step", muon, 1).optimizer
    assert saved == 4 * (counts["attention"] + counts["ffn"])


def test_an_asynchronous_checkpoint_is_staged_on_the_host() -> None:
    sharded, whole = recipe("7b", "parallel.zero_stage=3"), recipe("7b", "parallel.zero_stage=0", "precision=fp32")
    assert at("step", sharded, 8).host == at("step", sharded, 8).optimizer
    assert at("step", whole, 8).host == at("step", whole, 8).optimizer + at("step", whole, 8).weights


def test_offload_moves_states_to_the_host() -> None:
    blocking = "checkpoint.asynchronous=false"
    stay = recipe("7b", "parallel.zero_stage=3", blocking)
    go = recipe("7b", "parallel={zero_stage: 3, offload_optimizer: cpu, offload_parameters: cpu}", blocking)
    before, after = at("step", stay, 8), at("step", go, 8)
    assert before.host == 0 == after.optimizer == after.gradients
    share = before.optimizer // 12
    assert after.host == (12 + 4 + 2) * share
    assert before.weights - after.weights == 2 * share


def test_each_stage_and_each_recomputation_saves_memory() -> None:
    by_stage = [rank_memory(recipe("7b", f"parallel.zero_stage={stage}"), 64).total for stage in (1, 2, 3)]
    assert by_stage == sorted(by_stage, reverse=True)
    modes = (recipe("7b", f"parallel.activation_checkpointing={mode}") for mode in ("none", "selective", "full"))
    by_mode = [at("backward", config, 64).activations for config in modes]
    assert by_mode == sorted(by_mode, reverse=True)


def test_gradients_wait_for_backward_only_when_they_accumulate() -> None:
    lone = recipe("7b", "parallel.zero_stage=1", "batch.global_batch_size=8")
    several = recipe("7b", "parallel.zero_stage=1", "batch.global_batch_size=16")
    assert at("backward", lone, 8).gradients == 0
    assert at("backward", several, 8).gradients == 4 * parameter_counts(lone.model)["total"]


def test_the_escape_hatch_counts() -> None:
    small = "deepspeed={zero_optimization: {reduce_bucket_size: 10_000_000}}"
    assert at("reduction", recipe("7b", small), 8).buffers < at("reduction", recipe("7b"), 8).buffers


def test_overlap_takes_a_second_bucket() -> None:
    alone = "deepspeed={zero_optimization: {overlap_comm: false}}"
    for stage, element_bytes in ((1, 4), (2, 4), (3, 0)):
        zero = f"parallel.zero_stage={stage}"
        more = at("reduction", recipe("7b", zero), 8).buffers - at("reduction", recipe("7b", zero, alone), 8).buffers
        assert more == element_bytes * reduce_bucket_elements(8), stage


def test_an_impossible_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="parallel.tensor=3 does not divide model.num_heads=32"):
        rank_memory(recipe("7b", "parallel.tensor=3"), 3)


def test_constants_are_deepspeeds() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = DeepSpeedZeroConfig()
    assert {name: getattr(config, name.removeprefix("stage3_")) for name in DEEPSPEED_DEFAULTS} == DEEPSPEED_DEFAULTS
