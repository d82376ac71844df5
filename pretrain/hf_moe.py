"""Hugging Face's names and configs of experts: Mixtral's, and Qwen3-MoE's where queries and keys are normed."""

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig, MoEConfig, has_experts
from pretrain.hf_unsupported import UnsupportedError

# Ours -> theirs, where the value is the same.
_FIELDS = {
    "mixtral": {
        "experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_ffn_size": "intermediate_size",
    },
    "qwen3_moe": {
        "experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_ffn_size": "moe_intermediate_size",
        "normalize_weights": "norm_topk_prob",
    },
}
# What an absent key means to transformers' own config classes.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001},
    "qwen3_moe": {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "router_aux_loss_coef": 0.001,
    },
}
# What of ours both of theirs compute, and Mixtral besides.
_ONLY: dict[str, Any] = {"router": "softmax", "shared_experts": 0, "routed_scaling_factor": 1.0}
_ONLY_MIXTRAL: dict[str, Any] = {"normalize_weights": True, "first_layer": 0, "layer_frequency": 1}
# Names in a layer, ours -> a file's, where {} is the number of an expert.
_NAMES = {
    "mixtral": {
        "mlp.router.weight": "block_sparse_moe.gate.weight",
        "mlp.experts.gate_proj": "block_sparse_moe.experts.{}.w1.weight",
        "mlp.experts.up_proj": "block_sparse_moe.experts.{}.w3.weight",
        "mlp.experts.down_proj": "block_sparse_moe.experts.{}.w2.weight",
    },
    "qwen3_moe": {
        "mlp.router.weight": "mlp.gate.weight",
        "mlp.experts.gate_proj": "mlp.experts.{}.gate_proj.weight",
        "mlp.experts.up_proj": "mlp.experts.{}.up_proj.weight",
        "mlp.experts.down_proj": "mlp.experts.{}.down_proj.weight",
    },
}


def moe_from_hf(hf: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of `moe` for a `config.json` of Mixtral or Qwen3-MoE; None if its layers are all without experts.

    Their loss for balance is one over all tokens and layers at once, ours one for each sequence and layer: of it only
    the coefficient is taken over.
    Raises UnsupportedError where experts are in layers that our decoder cannot give them to.
    """
    model_type = hf["model_type"]
    theirs = {**_DEFAULTS[model_type], **hf}
    if "num_local_experts" in hf:
        theirs["num_experts"] = hf["num_local_experts"]  # what transformers 5 writes for either
    fields = {ours: theirs[key] for ours, key in _FIELDS[model_type].items()}
    if model_type == "qwen3_moe":
        layers = _layers_with_experts(theirs)
        if not layers:
            return None
        fields |= layers
    coefficient = theirs["router_aux_loss_coef"]
    return {**fields, "balance": "aux_loss" if coefficient else "none", "balance_coefficient": coefficient}


def moe_to_hf(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The keys that a `config.json` of Mixtral or Qwen3-MoE has for its experts.

    Raises ValueError for what transformers' model of that type does not compute.
    """
    moe = config.moe
    assert moe is not None
    _refuse_other_functions(moe, model_type)
    keys = {key: getattr(moe, ours) for ours, key in _FIELDS[model_type].items()}
    keys["router_aux_loss_coef"] = moe.balance_coefficient if moe.balance == "aux_loss" else 0.0
    if model_type == "qwen3_moe":
        keys["num_local_experts"] = moe.experts
        keys["decoder_sparse_step"] = 1
        keys["mlp_only_layers"] = [layer for layer in range(config.num_layers) if not has_experts(config, layer)]
    return keys


def stored_names(name: str, model_type: str, experts: int) -> list[str]:
    """Under which names a file has our parameter: its own, another one, or for stacked experts one for each."""
    prefix, _, rest = name.rpartition("mlp.")
    stored = _NAMES.get(model_type, {}).get(f"mlp.{rest}")
    if stored is None:
        return [name]
    return [prefix + stored.format(expert) for expert in range(experts)] if "{}" in stored else [prefix + stored]


def _layers_with_experts(theirs: Mapping[str, Any]) -> dict[str, int]:
    """Qwen3-MoE's list of exceptions as first_layer and layer_frequency; empty if no layer has experts."""
    count, step, exceptions = theirs["num_hidden_layers"], theirs["decoder_sparse_step"], theirs["mlp_only_layers"]
    layers = [layer for layer in range(count) if layer not in (exceptions or []) and (layer + 1) % step == 0]
    if not layers:
        return {}
    first = layers[0]
    frequency = layers[1] - first if len(layers) > 1 else count - first
    if layers != list(range(first, count, frequency)):
        raise UnsupportedError(
            f"mlp_only_layers {exceptions} with decoder_sparse_step {step} is not supported: it gives experts to "
            f"layers {', '.join(map(str, layers))}, our decoder only to every n-th layer from some layer on"
        )
    return {"first_layer": first, "layer_frequency": frequency}


def _refuse_other_functions(moe: MoEConfig, model_type: str) -> None:
    only = {**_ONLY, **(_ONLY_MIXTRAL if model_type == "mixtral" else {})}
    for field, value in only.items():
        if getattr(moe, field) != value:
            raise ValueError(
                f"moe.{field} {getattr(moe, field)!r} has no counterpart in transformers' {model_type}, which computes "
                f"{value!r} only, so this model cannot be exported"
            )
    if moe.groups_per_token < moe.groups or moe.balance == "bias":
        what = "moe.balance 'bias'" if moe.balance == "bias" else f"moe.groups_per_token {moe.groups_per_token}"
        raise ValueError(
            f"{what} has no counterpart in transformers' {model_type}, whose choice is by scores alone, so this model "
            "cannot be exported"
        )
