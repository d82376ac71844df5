"""Our decoder and transformers' model with the same weights, small and random."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from model.config import ModelConfig
from model.decoder import Decoder
from model.init import initialise
from pretrain.hf import config_to_hf
from pretrain.hf_weights import weights_to_hf

MOE = {"experts": 4, "experts_per_token": 2, "expert_ffn_size": 32}
MIXTRAL = {"moe": {**MOE, "expert_ffn_size": 96}}  # the width of an expert is `intermediate_size` there
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}


def config(**fields: Any) -> ModelConfig:
    small = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 96, "vocab_size": 200}
    return ModelConfig.model_validate({**small, **fields})


def build(model_config: ModelConfig) -> Decoder:
    """Every weight, the norms' too, away from its initial value; logits of size 1 and more."""
    decoder = Decoder(model_config)
    initialise(decoder, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            scale = 4 if parameter.dim() >= 2 else 1
            parameter.mul_(scale * (0.5 + torch.rand(parameter.shape, generator=generator)))
    return decoder


def theirs(decoder: Decoder) -> PreTrainedModel:
    """Their model with our weights, by their own reading of the tensors of a file."""
    hf = config_to_hf(decoder.config)
    config_class, model_class = CLASSES[hf["model_type"]]
    exported = weights_to_hf(decoder.state_dict(), decoder.config)
    built, result = model_class.from_pretrained(
        None, config=config_class(**hf), state_dict=exported, output_loading_info=True, dtype=torch.float32
    )
    assert not any(result[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), result
    return built.eval()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()
