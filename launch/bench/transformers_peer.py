"""transformers' model as a contender of `steppe bench train`: Llama, Qwen3, Mixtral or Qwen3-MoE, in a plain loop.

transformers is imported here, when a model is built, and nowhere else.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from model.parameters import is_decayed
from pretrain.config import RunConfig
from pretrain.engine import build_decoder, decoder_inputs
from pretrain.hf import config_to_hf
from pretrain.hf_weights import weights_to_hf
from pretrain.random_batch import random_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Its `batched_mm` copies the weights of an expert for each token, which training has no memory for; the others need
# packages of their own.
EXPERTS = ("eager", "grouped_mm")
TRIALS = 3


def build_model(config: RunConfig, device: torch.device, dtype: torch.dtype) -> "PreTrainedModel":
    """Its model of the same shape, with the weights that ours starts from, by its own reading of a file's tensors."""
    import transformers

    hf = config_to_hf(config.model)
    weights = weights_to_hf(build_decoder(config, device, torch.float32).state_dict(), config.model)
    model, report = getattr(transformers, hf["architectures"][0]).from_pretrained(
        None,
        config=transformers.AutoConfig.for_model(**hf),
        state_dict=weights,
        dtype=dtype,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.to(device).train()


def transformers_step(
    config: RunConfig, device: torch.device, pure_bf16: bool, compiled: bool = False
) -> tuple[Callable[[Batch], float], dict[str, Any]]:
    """A training step: its own loss, fused AdamW with the same groups, the same clipping; and what it is, in words.

    With experts it balances them as it does itself, by one loss over all layers, which the returned loss is without;
    of its ways to compute them it takes the one that proves the fastest here.
    """
    model = build_model(config, device, torch.bfloat16 if pure_bf16 else torch.float32)
    balanced = config.model.moe is not None and config.model.moe.balance == "aux_loss"
    about: dict[str, Any] = {"class": type(model).__name__}

    def losses(batch: Batch) -> tuple[Tensor, Tensor]:
        """What is learned from, and what is reported."""
        inputs = decoder_inputs(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=not pure_bf16):
            out = model(
                input_ids=inputs["tokens_BT"],
                labels=inputs["targets_BT"],
                shift_labels=inputs["targets_BT"],
                **({"output_router_logits": True} if balanced else {}),
            )
        reported = out.loss.detach()
        return out.loss, reported - model.router_aux_loss_coef * out.aux_loss.detach() if balanced else reported

    if config.model.moe is not None:
        seconds = _seconds_by_experts(model, lambda: losses(random_batch(config, 0))[0])
        fastest = min(seconds, key=seconds.__getitem__)
        model.set_experts_implementation(fastest)
        about |= {"experts": fastest, "forward_backward_seconds_by_experts": seconds}

    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(
        decay_groups(model, config.optimizer.weight_decay),
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=True,
    )

    def step(batch: Batch) -> float:
        loss, reported = losses(batch)
        loss.backward()
        if config.optimizer.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return reported.item()

    return step, about


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The same parameters decayed and spared as ours."""
    named = [(name.removeprefix("model."), parameter) for name, parameter in model.named_parameters()]
    return [
        {"params": [parameter for name, parameter in named if is_decayed(name)], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in named if not is_decayed(name)], "weight_decay": 0.0},
    ]


def _seconds_by_experts(model: "PreTrainedModel", loss: Callable[[], Tensor]) -> dict[str, float]:
    """Seconds of a forward and backward pass by each implementation, the best of some in turn after one unmeasured.
    The model stays as it was."""
    best = dict.fromkeys(EXPERTS, float("inf"))
    for trial in range(TRIALS + 1):
        for name in EXPERTS:
            model.set_experts_implementation(name)
            started = time.perf_counter()
            value = loss()
            value.backward()
            value.item()  # on a GPU, waits for the rest
            if trial:
                best[name] = min(best[name], time.perf_counter() - started)
            model.zero_grad()
    return best
