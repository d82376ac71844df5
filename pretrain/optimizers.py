"""Optimizers by name, over the two groups of parameters that weight decay tells apart."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from model.parameters import is_decayed
from pretrain.config import OptimizerConfig


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with decay, norms and embeddings without; both in the model's order. Empty groups are left out."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in named:
        (decayed if is_decayed(name) else spared).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer, its learning rate still 0: the engine sets it at each step, as a function of the step."""
    return OPTIMIZERS[config.name](groups, config)


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


# A test asserts that these are the names OptimizerConfig admits.
OPTIMIZERS = {"adamw": _adamw}
