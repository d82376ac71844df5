"""Counts from the config alone, against the real module and against published tables."""

import pytest
import torch

from model.accounting import flops_per_token, parameter_counts
from model.config import PRESETS, ModelConfig, padded_vocab_size
from model.decoder import Decoder
from model.parameters import is_decayed, parameter_shapes


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_those_of_the_module(name: str, qk_norm: bool) -> None:
    config = ModelConfig.model_validate({"preset": name, "qk_norm": qk_norm})
    with torch.device("meta"):
        decoder = Decoder(config)
    shapes = {key: tuple(parameter.shape) for key, parameter in decoder.named_parameters()}
    assert parameter_shapes(config) == shapes
    assert list(decoder.state_dict()) == list(shapes)

    padding = (padded_vocab_size(config.vocab_size) - config.vocab_size) * config.hidden_size
    padded_matrices = 1 if config.tie_embeddings else 2
    counts = parameter_counts(config)
    assert counts["total"] == sum(p.numel() for p in decoder.parameters()) - padded_matrices * padding
    assert counts["total"] == sum(counts[item] for item in ("embedding", "attention", "ffn", "norms", "head"))
    assert counts["norms"] == sum(p.numel() for p in decoder.parameters() if p.dim() == 1)
    assert counts["ffn"] == sum(p.numel() for key, p in decoder.named_parameters() if ".mlp." in key)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("7b", 6_738_415_616),  # Llama 2 7B, its safetensors index
        ("70b", 70_553_706_496),  # Llama 3 70B, likewise
        ("1b", 1_235_814_400),  # Llama 3.2 1B, likewise
        ("58m", 58_466_816),
        ("125m", 123_551_232),
        ("tiny-10m", 10_244_160),
    ],
)
def test_presets_have_their_published_sizes(name: str, published: int) -> None:
    assert parameter_counts(ModelConfig.model_validate({"preset": name}))["total"] == published


def test_flops_follow_the_stated_convention() -> None:
    config = ModelConfig.model_validate({"preset": "7b"})
    products = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    assert flops_per_token(config, 4096) == 6 * products + 12 * 32 * 4096 * 4096
    tied = config.model_copy(update={"tie_embeddings": True})
    assert flops_per_token(tied, 4096) == flops_per_token(config, 4096)


def test_flops_are_those_torch_counts() -> None:
    """torch counts two for each multiply-add of the products that run; its plain attention does not halve either."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(hidden_size=64, num_layers=2, num_heads=4, ffn_size=96, vocab_size=256)
    decoder, tokens = Decoder(config), torch.zeros(2, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        decoder(tokens, tokens).total.backward()
    assert counter.get_total_flops() == flops_per_token(config, 32) * tokens.numel()


def test_decay_spares_norms_and_the_embedding() -> None:
    config = ModelConfig.model_validate({"preset": "58m", "num_layers": 1, "qk_norm": True})
    assert [name for name in parameter_shapes(config) if not is_decayed(name)] == [
        "embed_tokens.weight",
        "layers.0.input_layernorm.weight",
        "layers.0.self_attn.q_norm.weight",
        "layers.0.self_attn.k_norm.weight",
        "layers.0.post_attention_layernorm.weight",
        "norm.weight",
    ]
