"""Where DeepSpeed 0.19.8 keeps a rank's share of masters, optimizer state and gradients, at each ZeRO stage.

It is pinned exactly, because this file reaches into it: stages 1 and 2 through `_hp_mapping` and `averaged_gradients`,
stage 3 through `grad_position`; the engine's class is narrowed so that one optimizer class serves both of the former.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.runtime.utils import is_invalid_grad_norm
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.utils import groups
from torch import Tensor, nn

from model.decoder import Block, Decoder
from pretrain.gradient_norm import squared_norm
from pretrain.parallel_dims import ParallelDims
from pretrain.placement import Placement

EXPERTS = "experts"  # DeepSpeed's name for the one family of expert-parallel groups


class Engine(DeepSpeedEngine):
    """DeepSpeed's engine without what it does to a model that is right already."""

    def _cast_module_mixed_precision(self, *_: Any, **__: Any) -> None:
        """Parameters come in their dtypes; routers stay fp32."""

    def _broadcast_model(self) -> None:
        """Values are written afterwards, the same on each rank, from the seed or from a checkpoint."""

    def _configure_distributed_model(self, model: nn.Module) -> None:
        super()._configure_distributed_model(model)
        # Stage 3 finds the experts' ranks parameter by parameter, and refuses layers that it does not know.
        shared_out = any(not getattr(parameter, "allreduce", True) for parameter in model.parameters())
        self.has_moe_layers = shared_out and self.zero_optimization_stage() < 3

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str | None:
        """Its choice for bf16 at stage 1 is another class, which keeps all gradients in fp32 and steps at start."""
        return ZERO_OPTIMIZATION if self.zero_optimization() else None


class ModelParallelUnit:
    """What DeepSpeed asks of Megatron's `mpu`. Its data parallelism is our `token` axis: it need not know sequences."""

    def __init__(self, dims: ParallelDims) -> None:
        self.dims = dims
        deepspeed.init_distributed(dist_init_required=False)
        self.alone = dist.new_group([dims.rank], use_local_synchronization=True)

    def _group(self, axis: Any) -> dist.ProcessGroup:
        return self.dims.groups[axis] or self.alone

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._group("tensor")

    def get_model_parallel_rank(self) -> int:
        return self.dims.index("tensor")

    def get_model_parallel_world_size(self) -> int:
        return self.dims.size("tensor")

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._group("token")

    def get_data_parallel_rank(self) -> int:
        return self.dims.index("token")

    def get_data_parallel_world_size(self) -> int:
        return self.dims.size("token")

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self.dims.layout.group_of(self.dims.rank, "token"))

    def announce_experts(self) -> None:
        """Tell DeepSpeed which ranks share out the experts, and which hold the same ones."""
        layout, rank = self.dims.layout, self.dims.rank
        groups._EXPERT_PARALLEL_GROUP = {EXPERTS: self._group("expert")}
        groups._EXPERT_DATA_PARALLEL_GROUP = {EXPERTS: self._group("expert_data")}
        groups._EXPERT_PARALLEL_GROUP_RANKS = {EXPERTS: list(layout.group_of(rank, "expert"))}
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS = {EXPERTS: list(layout.group_of(rank, "expert_data"))}


def mark(parameter: nn.Parameter, place: Placement, unit: ModelParallelUnit) -> None:
    """Tell DeepSpeed over which ranks a parameter's gradient is reduced and its state partitioned."""
    if place.replicas == "expert_data":
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = EXPERTS  # type: ignore[attr-defined]
        # Stage 3: its own expert parallelism marks parameters so, and averages them over all data-parallel ranks.
        parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
        parameter.ds_zero_partition_group_name = EXPERTS  # type: ignore[attr-defined]
        parameter.ds_zero_partition_process_group = unit._group("expert_data")  # type: ignore[attr-defined]


def zero_init(config: dict[str, Any], unit: ModelParallelUnit) -> deepspeed.zero.Init:
    """What partitions parameters at stage 3, one at a time by `partition`."""
    return deepspeed.zero.Init(
        data_parallel_group=unit.get_data_parallel_group(), config_dict_or_path=config, mpu=unit, enabled=True
    )


def partition(parameter: nn.Parameter, init: deepspeed.zero.Init) -> None:
    """Keep this rank's share of a parameter and let go of the rest; unlike DeepSpeed's own, without a broadcast."""
    init._convert_to_deepspeed_param(parameter)
    parameter.partition()  # type: ignore[attr-defined]


def gather_by_block(decoder: Decoder) -> None:
    """Let stage 3 gather a block's parameters all at once, around its forward, instead of each module's within it."""
    deepspeed.utils.set_z3_leaf_modules(decoder, [Block])


def build(model: nn.Module, optimizer: Any, config: dict[str, Any], unit: ModelParallelUnit) -> Engine:
    """The engine, as `deepspeed.initialize` would make it, of the narrowed class."""
    settings = DeepSpeedConfig(config, unit)
    return Engine(
        args=None,
        model=model,
        optimizer=optimizer,
        mpu=unit,
        dist_init_required=False,
        config=config,
        config_class=settings,
    )


class Fragment(NamedTuple):
    """`numel` values of a parameter that this rank owns: from `begin` on in the rank's shard of it, from `at` on in
    the flat `master`, which the optimizer updates as (a part of) its `group`."""

    name: str
    parameter: nn.Parameter
    group: dict[str, Any]
    master: Tensor
    at: int
    begin: int
    numel: int


def fragments(engine: Engine) -> Iterator[Fragment]:
    """What this rank owns of each parameter."""
    zero, stage, param_groups = engine.optimizer, engine.zero_optimization_stage(), engine.basic_optimizer.param_groups
    group_of = {parameter: group for group in param_groups for parameter in group["params"]}
    for name, parameter in engine.module.named_parameters():
        if stage == 0:
            yield Fragment(name, parameter, group_of[parameter], parameter, 0, 0, parameter.numel())
        elif stage == 3:
            index, at, numel = zero.grad_position[zero.get_param_id(parameter)]
            begin = parameter.partition_numel() * dist.get_rank(parameter.ds_process_group)
            owned = max(0, min(numel, parameter.ds_numel - begin))  # the last shares are padded
            group = param_groups[zero.sub_group_to_group_id[index]]
            yield Fragment(name, parameter, group, zero.fp32_partitioned_groups_flat[index], at, begin, owned)
        elif parameter._hp_mapping is not None:  # None: other ranks own all of this parameter
            mapping = parameter._hp_mapping
            master, local = mapping.hp_fragment_address, mapping.lp_fragment_address
            group = param_groups[mapping.param_group_index]
            yield Fragment(name, parameter, group, group["params"][0], master.start, local.start, master.numel)


def squared_gradient_norms(engine: Engine) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(parameter, squared L2 norm of this rank's share of its reduced gradient), loss scale included, before a step."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        for parameter in engine.module.parameters():
            yield parameter, squared_norm(parameter.grad)
        return
    held = zero.fp16_groups if stage == 3 else zero.params_in_partition
    offloaded = zero.offload_optimizer if stage == 3 else zero.cpu_offload
    for index, parameters in enumerate(held):
        if offloaded:
            norms = zero.norm_for_param_grads
            yield from ((p, norms[i].double().square()) for p in parameters if (i := zero.get_param_id(p)) in norms)
        else:
            gradients = (g for g in zero.averaged_gradients[index] if not getattr(g, "_zero_padding", False))
            # Ranks beyond the last parameter hold padding alone.
            for parameter, gradient in zip(parameters, gradients, strict=False):
                yield parameter, squared_norm(gradient)


def replace_clipping(
    engine: Engine, scaled_norm: Callable[[], Tensor], factor: Callable[[], Tensor], keep_scale: Callable[[], bool]
) -> None:
    """Let DeepSpeed take `scaled_norm()` for the norm of the scaled gradient; where it is not finite, leave the update
    out, else multiply each gradient by `factor()`. Where `keep_scale()`, fp16's loss scale hears of neither.

    DeepSpeed's own norm does not know all layouts, and it unscales by a loss scale that it may just have raised. Its
    test of the norm, which the host reads for it, is the one test for overflow. In 16 bits DeepSpeed would go through
    all gradients for another before it, reduced and read by itself; at stage 0 it has none.
    """
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        _let_skip(zero, scaled_norm, factor)
        return
    if stage == 3:
        zero._get_norm_groups = lambda: [scaled_norm()]
        zero.unscale_and_clip_grads = lambda index, _: shrink([zero.fp32_partitioned_groups_flat[index]], factor())
    else:
        zero.scaled_global_norm = scaled_norm
        zero.unscale_and_clip_grads = lambda gradients, _: [g.mul_(factor().to(g.device)) for g in gradients]
    zero.check_overflow = lambda **_: None
    update_scale = zero._update_scale
    zero._update_scale = lambda overflow: None if keep_scale() else update_scale(overflow)


def _let_skip(optimizer: Any, scaled_norm: Callable[[], Tensor], factor: Callable[[], Tensor]) -> None:
    """Give torch's optimizer, which is all there is at stage 0, ZeRO's step: norm, test for overflow, clipping."""
    update = optimizer.step

    def step() -> None:
        optimizer.overflow = is_invalid_grad_norm(scaled_norm())  # DeepSpeed's engine looks at it afterwards
        if not optimizer.overflow:
            shrink((parameter for group in optimizer.param_groups for parameter in group["params"]), factor())
            update()

    optimizer.step = step


def shrink(parameters: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply gradients by a factor."""
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.mul_(factor.to(parameter.grad.device))


def loss_scale(engine: Engine) -> float:
    """What the loss is multiplied by before backward: 1 but in fp16."""
    return engine.optimizer.loss_scale if engine.zero_optimization_stage() else 1.0


def forget_first_step(engine: Engine) -> None:
    """Some of DeepSpeed's optimizers make a step at start to allocate their state: back to before it."""
    for state in engine.basic_optimizer.state.values():
        for value in state.values():
            value.zero_()


def scalars(engine: Engine) -> dict[str, Any]:
    """Counters and the loss scale, as JSON values."""
    steps = {int(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state}
    assert len(steps) <= 1, f"parameter groups are at different steps: {steps}"
    counters = {key: getattr(engine, key) for key in ("global_steps", "global_samples", "skipped_steps")}
    scaler = vars(engine.optimizer.loss_scaler) if engine.fp16_enabled() else {}
    sound = {key: value for key, value in scaler.items() if type(value) in (int, float, bool)}
    return {"optimizer_steps": max(steps, default=0), "counters": counters, "loss_scaler": sound}


def restore_scalars(engine: Engine, saved: dict[str, Any]) -> None:
    """The inverse of `scalars`; what a checkpoint of another engine lacks stays."""
    for state in engine.basic_optimizer.state.values():
        state["step"].fill_(saved["optimizer_steps"])
    for key, value in saved.get("counters", {}).items():
        setattr(engine, key, value)
    if engine.fp16_enabled():
        vars(engine.optimizer.loss_scaler).update(saved.get("loss_scaler", {}))


def renew_parameters(engine: Engine) -> None:
    """Copy masters that were written from outside into the parameters that forward uses."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        zero.checkpoint_event_prologue()  # drops gathered copies, of small persistent parameters too
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()
    elif stage:
        zero.update_lp_params()


@contextmanager
def without_others() -> Iterator[None]:
    """For a rank whose others are faked: stage 3 compares its order of modules with the first's, which never came."""
    compare = partitioned_param_coordinator.assert_ints_same_as_other_ranks
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None
    try:
        yield
    finally:
        partitioned_param_coordinator.assert_ints_same_as_other_ranks = compare
