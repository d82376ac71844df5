"""nanoGPT's model as a contender of `steppe bench train`, in a plain loop like that of its `train.py`.

It is no package: its one module is loaded from the folder of a clone, and is called `model`, as a package of ours is.
"""

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from data_pipeline.batch import Batch
from model.accounting import parameter_counts
from model.config import ModelConfig
from pretrain.config import RunConfig
from pretrain.engine import decoder_inputs

MODULE = "nanogpt_model"
HEAD_SIZE = 64  # of GPT-2


def load_module(folder: Path) -> ModuleType:
    """`model.py` of a clone, under another name."""
    spec = importlib.util.spec_from_file_location(MODULE, folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def nearest_width(model: ModelConfig, sequence_length: int) -> int:
    """The width at which its model, with as many layers, has the number of parameters nearest to a dense one of ours:
    V D + T D + L (12 D^2 + 2 D) + D, its head being its embedding, and its MLP four times as wide as D."""
    ours, L = parameter_counts(model)["total"], model.num_layers
    linear, quadratic = model.vocab_size + sequence_length + 2 * L + 1, 12 * L
    heads = (math.sqrt(linear**2 + 4 * quadratic * ours) - linear) / (2 * quadratic) / HEAD_SIZE
    widths = [HEAD_SIZE * max(1, count) for count in (math.floor(heads), math.ceil(heads))]
    return min(widths, key=lambda D: abs(linear * D + quadratic * D * D - ours))


def nanogpt_step(
    config: RunConfig, device: torch.device, folder: Path, compiled: bool
) -> tuple[Callable[[Batch], float], dict[str, Any]]:
    """A training step as in its `train.py`, but for AdamW, which it fuses on GPUs alone; and what it is, in words.

    Its loss is of weights of its own.
    """
    D = nearest_width(config.model, config.data.sequence_length)
    module = load_module(folder)
    torch.manual_seed(config.seed)
    model: nn.Module = module.GPT(
        module.GPTConfig(
            block_size=config.data.sequence_length,
            vocab_size=config.model.vocab_size,
            n_layer=config.model.num_layers,
            n_head=D // HEAD_SIZE,
            n_embd=D,
            dropout=0.0,
            bias=False,
        )
    ).to(device)
    parameters = list(model.parameters())
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.optimizer.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=True,
    )

    def step(batch: Batch) -> float:
        inputs = decoder_inputs(batch, device)
        with torch.autocast(device.type, torch.bfloat16):
            _, loss = model(inputs["tokens_BT"], inputs["targets_BT"])
        loss.backward()
        if config.optimizer.grad_clip:
            nn.utils.clip_grad_norm_(parameters, config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    total = sum(p.numel() for p in parameters)
    shape = {"hidden_size": D, "ffn_size": 4 * D, "active_parameters": total, "total_parameters": total}
    return step, {"class": "GPT of nanoGPT", **shape}
