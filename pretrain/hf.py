"""Hugging Face's names and configs for the same decoder: Llama, and Qwen3 where queries and keys are normed; with
experts Mixtral, and Qwen3-MoE."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from model.config import ModelConfig, padded_vocab_size
from model.parameters import VOCABULARY_PARAMETERS, is_expert, parameter_shapes
from pretrain.hf_moe import moe_from_hf, moe_to_hf, stored_names

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

    Raises ValueError for another architecture, or a setting of this one that our decoder does not compute.
    """
    model_type = hf.get("model_type")
    if model_type not in ARCHITECTURES:
        supported = ", ".join(f"{kind} ({name})" for kind, name in ARCHITECTURES.items())
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {supported}")
    _refuse_other_functions(hf)
    theirs = {**_DEFAULTS[model_type], **hf}
    missing = [key for key in _FIELDS.values() if key not in theirs]
    if missing:
        raise ValueError(f"the Hugging Face config of a {model_type} model lacks {', '.join(missing)}")
    theta, scaling = _rope_from_hf(theirs)
    return ModelConfig.model_validate(
        {
            **{ours: theirs[key] for ours, key in _FIELDS.items()},
            "rope_theta": theta,
            "rope_scaling": scaling,
            "qk_norm": model_type in ("qwen3", "qwen3_moe"),
            "moe": moe_from_hf(hf) if model_type in ("mixtral", "qwen3_moe") else None,
        }
    )


def config_to_hf(
    config: ModelConfig, max_position_embeddings: int | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """A `config.json` for transformers; our decoder's document mask, and how the balance of experts is learned but for
    its coefficient, have no counterpart there and are left out.

    max_position_embeddings: tokens the model has been trained to see at once (default: what its RoPE scaling reaches,
    else 2048). transformers does not limit a model by it, but its tools show and use it.
    Raises ValueError for a shape that transformers refuses.
    """
    model_type = _model_type(config)
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


def weights_from_hf(hf: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our names, in the decoder's order; the vocabulary padded with zero rows, the experts of a layer stacked.

    Raises ValueError if a tensor is missing, unknown, or of another shape than `config` says.
    """
    shapes = parameter_shapes(config)
    sources = {name: _sources(name, config) for name in shapes}
    theirs = {name.removeprefix("model."): name for name in hf if not name.endswith(".inv_freq")}
    if config.tie_embeddings:
        theirs.pop("lm_head.weight", None)  # some files repeat the tied weight
    expected = {source for several in sources.values() for source in several}
    missing, unknown = sorted(expected - theirs.keys()), sorted(theirs.keys() - expected)
    if missing or unknown:
        lacks = f"lacks {_some(missing)}" if missing else f"has {_some(unknown)}, which its config does not mention"
        raise ValueError(f"the checkpoint {lacks}: its config and its tensors do not belong together")
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        of_one = shape[1:] if is_expert(name) else _unpadded(name, shape, config)
        tensors = [hf[theirs[source]] for source in sources[name]]
        for source, tensor in zip(sources[name], tensors, strict=True):
            if tuple(tensor.shape) != of_one:
                raise ValueError(f"{source} has shape {tuple(tensor.shape)}, but the checkpoint's config says {of_one}")
        weight = torch.stack(tensors) if is_expert(name) else tensors[0]
        weights[name] = _pad(weight) if name in VOCABULARY_PARAMETERS else weight
    return weights


def weights_to_hf(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """transformers' names in files, the vocabulary without its padding, each expert by itself; a tied head is left to
    the config to say."""
    theirs: dict[str, Tensor] = {}
    for name, weight in weights.items():
        tensor = weight[: config.vocab_size].contiguous() if name in VOCABULARY_PARAMETERS else weight
        tensors = tensor.unbind() if is_expert(name) else (tensor,)
        prefix = "" if name.startswith("lm_head.") else "model."
        theirs.update({prefix + source: t for source, t in zip(_sources(name, config), tensors, strict=True)})
    return theirs


def load_hf_folder(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights (our names, the stored dtype) of a folder with `config.json` and `*.safetensors`.

    Raises FileNotFoundError if a file is missing, ValueError if it does not fit.
    """
    config_file = path / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{path} is not a Hugging Face model folder: it has no config.json")
    config = config_from_hf(_read_json(config_file))
    return config, weights_from_hf(_StoredTensors(_weight_files(path)), config)


class _StoredTensors(Mapping[str, Tensor]):
    """The tensors of some files by name, each read when it is asked for: memory need not hold a layer's experts
    stacked and by themselves for all layers at once."""

    def __init__(self, files: list[Path]) -> None:
        self._files: dict[str, Any] = {}
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing, though the folder's index names it; download it again")
            stored = safe_open(file, framework="pt")
            self._files.update(dict.fromkeys(stored.keys(), stored))

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _model_type(config: ModelConfig) -> str:
    if config.moe is None:
        return "qwen3" if config.qk_norm else "llama"
    return "qwen3_moe" if config.qk_norm else "mixtral"


def _sources(name: str, config: ModelConfig) -> list[str]:
    """The names of a parameter in a file, without the leading `model.`."""
    return stored_names(name, _model_type(config), config.moe.experts if config.moe is not None else 0)


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return [path / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    single = path / "model.safetensors"
    if single.is_file():
        return [single]
    raise FileNotFoundError(f"{path} has neither model.safetensors nor model.safetensors.index.json")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def _refuse_other_functions(hf: Mapping[str, Any]) -> None:
    for key, allowed in _ONLY.items():
        if hf.get(key) not in (None, *allowed):
            raise ValueError(f"{key} {hf[key]!r} is not supported: our decoder computes {allowed[0]!r} only")
    if hf["model_type"] == "mixtral" and hf.get("sliding_window") is not None:
        raise ValueError(
            f"sliding_window {hf['sliding_window']} is not supported: our decoder attends to all tokens before"
        )


def _rope_from_hf(hf: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """rope_theta, and our `rope_scaling`, from either version's keys."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    if kind not in _ROPE_KEYS:
        raise ValueError(f"RoPE scaling {kind!r} is not supported; supported: {', '.join(_ROPE_KEYS)}")
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    if kind == "yarn":
        _settle_yarn(rope)
    if "original_max_position_embeddings" in _ROPE_KEYS[kind]:
        rope.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
    given = {key: value for key, value in rope.items() if value is not None}
    unknown = given.keys() - set(_ROPE_KEYS[kind])
    if unknown:
        raise ValueError(f"RoPE scaling {kind!r} with {', '.join(sorted(unknown))} is not supported")
    return theta, None if kind == "default" else {"type": kind, **given}


def _settle_yarn(rope: dict[str, Any]) -> None:
    """Bring DeepSeek's way to write YaRN to the paper's: a ratio of two mscales is an attention factor."""
    mscale, mscale_all_dim = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    if rope.get("attention_factor") is None and rope.get("factor") and mscale and mscale_all_dim:
        log_factor = 0.1 * math.log(rope["factor"])
        rope["attention_factor"] = (mscale * log_factor + 1) / (mscale_all_dim * log_factor + 1)
    if rope.get("truncate") is True:
        del rope["truncate"]


def _unpadded(name: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    return (config.vocab_size, *shape[1:]) if name in VOCABULARY_PARAMETERS else shape


def _pad(weight_VD: Tensor) -> Tensor:
    missing = padded_vocab_size(len(weight_VD)) - len(weight_VD)
    return torch.nn.functional.pad(weight_VD, (0, 0, 0, missing))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
