"""Steppe's decoder trained in a plain loop, without DeepSpeed: what DeepSpeed's part of a step is measured against."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from model.init import initial_value
from pretrain.config import RunConfig
from pretrain.engine import DTYPES, balance_experts, decoder_inputs
from pretrain.gradient_norm import squared_norm
from pretrain.optimizers import build_optimizer, parameter_groups
from pretrain.parallel_dims import ParallelDims
from pretrain.parallelize import parallelize


def bare_step(config: RunConfig, device: torch.device) -> Callable[[Batch], float]:
    """A training step: the engine's arithmetic of one rank and one micro-batch, with fp32 masters and gradients, and
    its initial values and kernels; returns the mean loss of the batch's targets before the step.

    Not part of it: reduction, accumulation, skipping a step that is not finite, and whatever DeepSpeed does besides.
    """
    decoder = parallelize(config, device, DTYPES[config.precision], ParallelDims.of_this_rank(config))
    parameters = dict(decoder.named_parameters())
    masters = {
        name: nn.Parameter(initial_value(name, tuple(parameter.shape), config.seed, config.model).to(device))
        for name, parameter in parameters.items()
    }
    optimizer = build_optimizer(parameter_groups(masters.items(), config.optimizer), config)
    for group in optimizer.param_groups:
        group["lr"] = config.optimizer.lr
    _copy(masters, parameters)

    def step(batch: Batch) -> float:
        sums = decoder(**decoder_inputs(batch, device), z_loss=config.optimizer.z_loss)
        (sums.total / batch.valid_tokens + sums.auxiliary / len(batch.tokens)).backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            masters[name].grad, parameter.grad = parameter.grad.float(), None
        if config.optimizer.grad_clip:
            squared = torch.stack([squared_norm(master.grad) for master in masters.values() if master.grad is not None])
            nn.utils.clip_grads_with_norm_(masters.values(), config.optimizer.grad_clip, squared.sum().sqrt().float())
        optimizer.step()
        optimizer.zero_grad()
        _copy(masters, parameters)
        balance_experts(decoder, updated=True)
        return float(sums.nll / batch.valid_tokens)

    return step


@torch.no_grad()
def _copy(masters: dict[str, nn.Parameter], parameters: dict[str, nn.Parameter]) -> None:
    pairs: list[tuple[Tensor, Tensor]] = [(parameters[name], master) for name, master in masters.items()]
    for parameter, master in pairs:
        parameter.copy_(master)
