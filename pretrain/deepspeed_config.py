"""DeepSpeed's JSON, derived from the recipe, into which its own `deepspeed:` section is merged last. No torch here."""

import difflib
from typing import Any

from pretrain.config import RunConfig
from pretrain.layout import micro_batches

# What a user must not set in `deepspeed:`, and what to set instead.
INSTEAD = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.global_batch_size and batch.micro_batch_size",
    "gradient_clipping": "optimizer.grad_clip",
    "prescale_gradients": "nothing: losses are divided by the number of targets that count",
    "gradient_predivide_factor": "nothing: losses are divided by the number of targets that count",
    "communication_data_type": "parallel.reduce_dtype",
    "seq_parallel_communication_data_type": "parallel.reduce_dtype",
    "data_types": "precision",
    "fp16": "precision",
    "bf16": "precision",
    "bfloat16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "tensor_parallel": "parallel.tensor",
    "sequence_parallel_size": "parallel.sequence",
    "data_parallel_size": "nothing: it follows from the number of ranks",
    "expert_parallel": "parallel.expert",
    "activation_checkpointing": "parallel.activation_checkpointing",
    "compile": "parallel.compile",
    "checkpoint": "checkpoint",
    "zero_allow_untested_optimizer": "nothing",
    "zero_force_ds_cpu_optimizer": "nothing",
    "tensorboard": "nothing: every run has a TensorBoard log",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer": "parallel.offload_optimizer",
    "zero_optimization.offload_param": "parallel.offload_parameters",
    "zero_optimization.cpu_offload": "parallel.offload_optimizer",
}
# What a user may set: how fast, not what. Anything else could move the state that checkpoints read, or change numbers.
ALLOWED: dict[str, type] = {
    "comms_logger": dict,
    "dump_state": bool,
    "flops_profiler": dict,
    "memory_breakdown": bool,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "zero_optimization.allgather_bucket_size": int,
    "zero_optimization.allgather_partitions": bool,
    "zero_optimization.contiguous_gradients": bool,
    "zero_optimization.overlap_comm": bool,
    "zero_optimization.reduce_bucket_size": int,
    "zero_optimization.reduce_scatter": bool,
    "zero_optimization.stage3_max_live_parameters": int,
    "zero_optimization.stage3_max_reuse_distance": int,
    "zero_optimization.stage3_param_persistence_threshold": int,
    "zero_optimization.stage3_prefetch_bucket_size": int,
    "zero_optimization.sub_group_size": int,
    "zero_optimization.use_multi_rank_bucket_allreduce": bool,
}


def deepspeed_config(config: RunConfig, data_world: int, overlaps: bool = False) -> dict[str, Any]:
    """DeepSpeed's JSON for a run. Accumulation boundaries are set by the engine, so a batch ramp needs nothing here.

    data_world: ranks with other sequences. overlaps: whether the device communicates beside what it computes.
    Raises ValueError where `deepspeed:` sets what the recipe decides elsewhere, or what is not ALLOWED.
    """
    parallel = config.parallel
    token_world = data_world * parallel.sequence  # ranks over which gradients are reduced
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch.micro_batch_size,
        "gradient_accumulation_steps": micro_batches(config, config.batch.global_batch_size, data_world),
        "gradient_clipping": 0.0,  # the engine clips
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "reduce_bucket_size": reduce_bucket_elements(token_world),
            # A gradient is copied into its bucket as soon as it is made, and its own memory is free again.
            "contiguous_gradients": True,
            # Two buckets take turns: one is reduced while backward fills the other. Alone a rank has nothing to hide.
            # Deterministic runs do without: should a wait between the two streams ever be missing, digits would differ.
            "overlap_comm": overlaps and token_world > 1 and not config.deterministic,
        },
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW; DeepSpeed's own would be compiled at start
        "zero_force_ds_cpu_optimizer": False,  # the same with offload
        "communication_data_type": parallel.reduce_dtype,  # its default for bf16 reduces gradients in bf16
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
    }
    if parallel.offload_optimizer != "none":
        derived["zero_optimization"]["offload_optimizer"] = {"device": parallel.offload_optimizer}
    if parallel.offload_parameters != "none":
        derived["zero_optimization"]["offload_param"] = {"device": parallel.offload_parameters}
    if config.precision == "bf16":
        derived["bf16"] = {"enabled": True}
    if config.precision == "fp16":
        derived["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}
    return _merged(derived, config.deepspeed)


def reduce_bucket_elements(ranks: int) -> int:
    """Gradients, in elements, that are reduced at a time over so many ranks.

    A ring takes 2 (ranks - 1) steps, each of which carries 1 / ranks of a bucket and has a latency: to be bound by
    bandwidth, a bucket grows with the ranks. The constants are Megatron-Core's for its buckets
    (`DistributedDataParallelConfig.bucket_size`): 160 MB in fp32, and 4 MB a rank beyond 40. DeepSpeed's own 500 M
    elements would take 2 GB, twice that where two buckets take turns, and leave small models nothing to overlap.
    """
    return max(40_000_000, 1_000_000 * ranks)


def _merged(derived: dict[str, Any], given: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    merged = dict(derived)
    for key, value in given.items():
        path = prefix + key
        if path in ALLOWED:
            if type(value) is not ALLOWED[path] or (isinstance(value, int) and ALLOWED[path] is int and value <= 0):
                kind = {bool: "true or false", int: "a whole number above 0", dict: "a mapping"}[ALLOWED[path]]
                raise ValueError(f"deepspeed.{path}={value!r} must be {kind}: correct it, or leave it out")
            merged[key] = value
        elif path == "zero_optimization" and isinstance(value, dict):
            merged[key] = _merged(derived[key], value, f"{path}.")
        elif path not in INSTEAD:
            near = difflib.get_close_matches(path, (*ALLOWED, "zero_optimization"), n=1, cutoff=0.0)[0]
            raise ValueError(
                f"deepspeed.{path}={value!r} is not among what may be set: did you mean {near}? "
                f"Those are {', '.join(ALLOWED)}"
            )
        elif derived.get(key) != value:
            raise ValueError(
                f"deepspeed.{path}={value!r} contradicts what the recipe says elsewhere ({derived.get(key)!r}): "
                f"leave it out and set {INSTEAD[path]}"
            )
    return merged
