"""What DeepSpeed is told, and what a recipe's `deepspeed:` section may add to it."""

import pytest

from pretrain.deepspeed_config import ALLOWED, INSTEAD, deepspeed_config, reduce_bucket_elements
from tests.small_run import small_config


def test_derived() -> None:
    told = deepspeed_config(small_config("precision=bf16", "parallel.zero_stage=2"), data_world=2)
    assert told["gradient_accumulation_steps"] == 2
    assert told["bf16"] == {"enabled": True}
    assert told["communication_data_type"] == "fp32"
    assert told["data_types"] == {"grad_accum_dtype": "fp32"}


def test_a_recipe_may_add_and_tune() -> None:
    config = small_config("deepspeed={zero_optimization: {reduce_bucket_size: 1000}, wall_clock_breakdown: true}")
    told = deepspeed_config(config, 1)
    assert told["zero_optimization"]["reduce_bucket_size"] == 1000
    assert told["wall_clock_breakdown"] is True


@pytest.mark.parametrize("ranks", [1, 8, 40, 41, 1024])
def test_buckets_grow_with_the_ranks(ranks: int) -> None:
    """Megatron-Core's rule: from 40 ranks on, a million elements a rank."""
    assert reduce_bucket_elements(ranks) == (40_000_000 if ranks <= 40 else ranks * 1_000_000)


def test_every_rank_with_other_tokens_counts_for_a_bucket() -> None:
    config = small_config("parallel.sequence=2", "batch={global_batch_size: 256, micro_batch_size: 1}")
    assert deepspeed_config(config, 128)["zero_optimization"]["reduce_bucket_size"] == 256_000_000


@pytest.mark.parametrize(
    ("overrides", "ranks", "overlaps", "expected"),
    [
        ((), 2, True, True),
        ((), 2, False, False),  # a processor
        ((), 1, True, False),  # nobody to send to
        (("parallel.sequence=2",), 1, True, True),
        (("parallel.zero_stage=3",), 2, True, True),
        (("deterministic=true",), 2, True, False),
        (("deepspeed={zero_optimization: {overlap_comm: false}}",), 2, True, False),
        (("deepspeed={zero_optimization: {overlap_comm: true}}",), 2, False, True),
    ],
)
def test_overlap(overrides: tuple[str, ...], ranks: int, overlaps: bool, expected: bool) -> None:
    told = deepspeed_config(small_config(*overrides), ranks, overlaps)
    assert told["zero_optimization"]["overlap_comm"] is expected


def test_saying_the_same_is_no_contradiction() -> None:
    config = small_config("deepspeed={zero_optimization: {stage: 1}, train_micro_batch_size_per_gpu: 2}")
    assert deepspeed_config(config, 1)["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("section", "path", "remedy"),
    [
        ("{zero_optimization: {stage: 2}}", "zero_optimization.stage=2", "set parallel.zero_stage"),
        ("{gradient_clipping: 3.0}", "gradient_clipping=3.0", "set optimizer.grad_clip"),
        ("{bf16: {enabled: false}}", "bf16=", "set precision"),
        ("{optimizer: {type: Adam}}", "optimizer=", "set optimizer"),
        ("{zero_optimization: {zero_hpz_partition_size: 2}}", "zero_hpz_partition_size=2", "not among what may be set"),
        ("{zero_optimization: true}", "zero_optimization=True", "not among what may be set"),
        ("{zero_optimization: {cpu_offload_param: true}}", "cpu_offload_param=True", "not among what may be set"),
        ("{zero_optimization: {compute_grad_norm: false}}", "compute_grad_norm=False", "not among what may be set"),
        ("{gradient_allreduce_op: sum}", "gradient_allreduce_op='sum'", "not among what may be set"),
        ("{managed_gradient_accumulation: false}", "managed_gradient_accumulation=False", "not among what may be set"),
        ("{zero_optimisation: {overlap_comm: true}}", "zero_optimisation=", "did you mean zero_optimization"),
        ("{zero_optimization: {reduce_bucket_size: -1}}", "reduce_bucket_size=-1", "must be a whole number above 0"),
        (
            "{zero_optimization: {reduce_bucket_size: abc}}",
            "reduce_bucket_size='abc'",
            "must be a whole number above 0",
        ),
        ("{zero_optimization: {overlap_comm: 7}}", "overlap_comm=7", "must be true or false"),
        ("{flops_profiler: 1}", "flops_profiler=1", "must be a mapping"),
        ("{wall_clock_brekdown: true}", "wall_clock_brekdown=True", "did you mean wall_clock_breakdown"),
        ("{zero_optimization: {offload_param: {device: cpu}}}", "offload_param=", "set parallel.offload_parameters"),
    ],
)
def test_a_contradiction_is_refused(section: str, path: str, remedy: str) -> None:
    config = small_config("precision=bf16", f"deepspeed={section}")
    with pytest.raises(ValueError, match=remedy) as caught:
        deepspeed_config(config, 1)
    assert path in str(caught.value)


def test_what_is_derived_is_guarded() -> None:
    """Each key that is derived and is not a matter of speed cannot be set to something else."""
    config = small_config("precision=bf16", "parallel={zero_stage: 3, offload_optimizer: cpu, offload_parameters: cpu}")
    told = deepspeed_config(config, 1)
    keys = {*told, *(f"zero_optimization.{key}" for key in told["zero_optimization"])} - {"zero_optimization"}
    assert keys <= set(INSTEAD) | set(ALLOWED)
