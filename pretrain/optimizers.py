"""Optimizers by name, the groups of parameters that they treat alike, and the state that they keep of each."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from model.parameters import is_block_matrix, is_decayed, keeps_fp32
from pretrain.config import OptimizerConfig, RunConfig
from pretrain.muon import Muon

# Tensors of a parameter's own shape that an algorithm keeps of it, besides the number of steps.
STATE_KINDS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameters that are alike in algorithm, weight decay, dtype and whether expert parallelism shares them out.

    Matrices come before what is spared from decay; parameters kept in fp32 come last, since DeepSpeed takes a run's
    dtype from the first group. Within a group the model's order holds. DeepSpeed finds the ranks that reduce the
    gradients of shared-out experts (`parameter.allreduce` is False) by the group's `moe` and `name`.
    """
    alike: dict[tuple[bool, str, str, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        algorithm = algorithm_of(name, parameter.ndim, config)
        experts = "" if getattr(parameter, "allreduce", True) else parameter.group_name  # type: ignore[attr-defined]
        alike[keeps_fp32(name), experts, algorithm, not is_decayed(name)].append(parameter)
    return [
        {
            "params": parameters,
            "algorithm": algorithm,
            "weight_decay": 0.0 if spared else config.weight_decay,
            **({"momentum": config.momentum} if algorithm == "muon" else {}),
            **({"moe": True, "name": experts} if experts else {}),
        }
        for (_, experts, algorithm, spared), parameters in sorted(alike.items(), key=lambda item: item[0])
    ]


def algorithm_of(name: str, dimensions: int, config: OptimizerConfig) -> str:
    """What updates a parameter: a key of STATE_KINDS."""
    return "muon" if config.name == "muon" and is_block_matrix(name, dimensions) else "adamw"


def build_optimizer(groups: list[dict[str, Any]], config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer, its learning rate still 0: the engine sets it at each step, as a function of the step."""
    return OPTIMIZERS[config.optimizer.name](groups, config)


def state_kinds(group: dict[str, Any]) -> tuple[str, ...]:
    """Kinds of state, each of a parameter's shape, that the optimizer keeps of a group's parameters."""
    return STATE_KINDS[group["algorithm"]]


def ensure_state(optimizer: torch.optim.Optimizer, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """A parameter's state by kind, without the step counter; made as the first step would if there is none yet."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state.update({kind: torch.zeros_like(parameter) for kind in state_kinds(group)})
    return {kind: state[kind] for kind in state_kinds(group)}


def _adamw(groups: list[dict[str, Any]], config: RunConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, betas=config.optimizer.betas, eps=config.optimizer.eps, fused=True)


def _muon(groups: list[dict[str, Any]], config: RunConfig) -> torch.optim.Optimizer:
    # fp16 would lose the small elements of an update before it is normalised.
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return Muon(groups, dtype, lr=0.0, betas=config.optimizer.betas, eps=config.optimizer.eps)


# A test asserts that these are the names OptimizerConfig admits.
OPTIMIZERS = {"adamw": _adamw, "muon": _muon}
