"""Hugging Face's configs for the same decoder: Llama, and Qwen3 where queries and keys are normed; with experts
Mixtral, and Qwen3-MoE."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError

from model.config import ModelConfig
from pretrain.hf_moe import moe_from_hf, moe_to_hf
from pretrain.hf_unsupported import UnsupportedError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

# Ours -> theirs, where the value is the same.
_FIELDS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "ffn_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
# What an absent key means to transformers' own config classes.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    "mixtral": {
        "num_key_value_heads": 8,
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 1000000.0,
    },
    "qwen3_moe": {"num_key_value_heads": 4, "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
}
# Keys that change the function the model computes, and the only values that ours computes.
_ONLY = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,),
}
# Keys that transformers adds to the config of each type besides.
_ALSO: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "qwen3": {"attention_bias": False, "use_sliding_window": False},
    "mixtral": {"sliding_window": None},
    "qwen3_moe": {"attention_bias": False, "use_sliding_window": False},
}
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}
_DEFAULT_MAX_POSITIONS = 2048


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a `config.json`, as transformers 4 or 5 writes it.

    Raises UnsupportedError for another architecture, or a setting of this one that our decoder does not compute, and
    ValueError for what is no model's config.
    """
    model_type = hf.get("model_type")
    if model_type not in ARCHITECTURES:
        supported = ", ".join(f"{kind} ({name})" for kind, name in ARCHITECTURES.items())
        raise UnsupportedError(f"model_type {model_type!r} is not supported; supported: {supported}")
    _refuse_other_functions(hf)
    theirs = {**_DEFAULTS[model_type], **hf}
    missing = [key for key in _FIELDS.values() if key not in theirs]
    if missing:
        raise ValueError(f"the Hugging Face config of a {model_type} model lacks {', '.join(missing)}")
    theta, scaling = _rope_from_hf(theirs)
    fields = {
        **{ours: theirs[key] for ours, key in _FIELDS.items()},
        "rope_theta": theta,
        "rope_scaling": scaling,
        "qk_norm": model_type in ("qwen3", "qwen3_moe"),
        "moe": moe_from_hf(hf) if model_type in ("mixtral", "qwen3_moe") else None,
    }
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        ours = ".".join(map(str, first["loc"]))
        stated = f"{_FIELDS.get(ours, ours)}={first['input']!r}: " if ours else ""
        raise ValueError(f"the Hugging Face config is no model's: {stated}{first['msg']}") from None


def config_to_hf(
    config: ModelConfig, max_position_embeddings: int | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """A `config.json` for transformers; our decoder's document mask, and how the balance of experts is learned but for
    its coefficient, have no counterpart there and are left out.

    max_position_embeddings: tokens the model has been trained to see at once (default: what its RoPE scaling reaches,
    else 2048). transformers does not limit a model by it, but its tools show and use it.
    Raises ValueError for a shape that transformers refuses.
    """
    model_type = model_type_of(config)
    if model_type == "llama" and config.hidden_size % config.num_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not divisible by num_heads {config.num_heads}: transformers' Llama "
            "refuses such a shape, so this model cannot be exported"
        )
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    reach = _DEFAULT_MAX_POSITIONS
    if config.rope_scaling is not None:
        scaling = config.rope_scaling.model_dump(exclude_none=True)
        rope |= {"rope_type": scaling.pop("type"), **scaling}
        reach = math.ceil(scaling.get("original_max_position_embeddings", reach) * config.rope_scaling.factor)
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **{key: getattr(config, ours) for ours, key in _FIELDS.items()},
        # Twice: `rope_parameters` is read by transformers 5, the other two by 4.
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "max_position_embeddings": reach if max_position_embeddings is None else max_position_embeddings,
        "hidden_act": "silu",
        **_ALSO[model_type],
        **(moe_to_hf(config, model_type) if config.moe is not None else {}),
        "initializer_range": 0.02,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def model_type_of(config: ModelConfig) -> str:
    """transformers' name for the architecture of a config."""
    if config.moe is None:
        return "qwen3" if config.qk_norm else "llama"
    return "qwen3_moe" if config.qk_norm else "mixtral"


def _refuse_other_functions(hf: Mapping[str, Any]) -> None:
    for key, allowed in _ONLY.items():
        if hf.get(key) not in (None, *allowed):
            raise UnsupportedError(f"{key} {hf[key]!r} is not supported: our decoder computes {allowed[0]!r} only")
    if hf["model_type"] == "mixtral" and hf.get("sliding_window") is not None:
        raise UnsupportedError(
            f"sliding_window {hf['sliding_window']} is not supported: our decoder attends to all tokens before"
        )


def _rope_from_hf(hf: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """rope_theta, and our `rope_scaling`, from either version's keys."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    if kind not in _ROPE_KEYS:
        raise UnsupportedError(f"RoPE scaling {kind!r} is not supported; supported: {', '.join(_ROPE_KEYS)}")
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    if kind == "yarn":
        _settle_yarn(rope)
    if "original_max_position_embeddings" in _ROPE_KEYS[kind]:
        rope.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
    given = {key: value for key, value in rope.items() if value is not None}
    unknown = given.keys() - set(_ROPE_KEYS[kind])
    if unknown:
        raise UnsupportedError(f"RoPE scaling {kind!r} with {', '.join(sorted(unknown))} is not supported")
    return theta, None if kind == "default" else {"type": kind, **given}


def _settle_yarn(rope: dict[str, Any]) -> None:
    """Bring DeepSeek's way to write YaRN to the paper's: a ratio of two mscales is an attention factor."""
    mscale, mscale_all_dim = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    if rope.get("attention_factor") is None and rope.get("factor") and mscale and mscale_all_dim:
        log_factor = 0.1 * math.log(rope["factor"])
        rope["attention_factor"] = (mscale * log_factor + 1) / (mscale_all_dim * log_factor + 1)
    if rope.get("truncate") is True:
        del rope["truncate"]
