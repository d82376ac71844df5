"""Counts from the config alone, against the real module and against published tables."""

import pytest
import torch

from model.accounting import ITEMS, flops_per_token, parameter_counts
from model.config import ModelConfig, padded_vocab_size
from model.decoder import Decoder
from model.parameters import buffer_shapes, is_decayed, is_expert, keeps_fp32, parameter_shapes
from model.presets import PRESETS

DEEPSEEK_LIKE = {
    "preset": "tiny-moe",
    "moe": {
        "first_layer": 1,
        "layer_frequency": 2,
        "shared_experts": 2,
        "router": "sigmoid",
        "balance": "bias",
        "groups": 4,
        "groups_per_token": 2,
    },
}


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("fields", [*({"preset": name} for name in PRESETS), DEEPSEEK_LIKE], ids=lambda f: str(f)[:40])
def test_counts_are_those_of_the_module(fields: dict[str, object], qk_norm: bool) -> None:
    config = ModelConfig.model_validate({**fields, "qk_norm": qk_norm})
    with torch.device("meta"):
        decoder = Decoder(config)
    shapes = {key: tuple(parameter.shape) for key, parameter in decoder.named_parameters()}
    assert parameter_shapes(config) == shapes
    state = {key: tuple(tensor.shape) for key, tensor in decoder.state_dict().items()}
    assert {key: shape for key, shape in state.items() if key not in shapes} == buffer_shapes(config)
    assert [key for key in state if key in shapes] == list(shapes)

    padding = (padded_vocab_size(config.vocab_size) - config.vocab_size) * config.hidden_size
    padded_matrices = 1 if config.tie_embeddings else 2
    counts = parameter_counts(config)
    assert counts["total"] == sum(p.numel() for p in decoder.parameters()) - padded_matrices * padding
    assert counts["total"] == sum(counts[item] for item in ITEMS)
    assert counts["norms"] == sum(p.numel() for p in decoder.parameters() if p.dim() == 1)
    in_mlp = counts["ffn"] + counts["router"] + counts["experts"]
    assert in_mlp == sum(p.numel() for key, p in decoder.named_parameters() if ".mlp." in key)
    assert counts["experts"] == sum(p.numel() for p in decoder.parameters() if p.dim() == 3)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("7b", 6_738_415_616),  # Llama 2 7B, its safetensors index
        ("70b", 70_553_706_496),  # Llama 3 70B, likewise
        ("1b", 1_235_814_400),  # Llama 3.2 1B, likewise
        ("58m", 58_466_816),
        ("125m", 123_551_232),
        ("tiny-10m", 10_244_160),
        ("mixtral-8x7b", 46_702_792_704),  # its safetensors index
        ("qwen3-30b-a3b", 30_532_122_624),  # likewise
    ],
)
def test_presets_have_their_published_sizes(name: str, published: int) -> None:
    assert parameter_counts(ModelConfig.model_validate({"preset": name}))["total"] == published


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("mixtral-8x7b", 46.7, 12.9), ("qwen3-30b-a3b", 30.5, 3.3), ("tiny-moe", 0.0257, 0.0103), ("7b", 6.74, 6.74)],
)
def test_presets_have_their_published_active_sizes(name: str, total: float, active: float) -> None:
    """In billions: arXiv 2401.04088, section 2.1; Qwen3's model card; every parameter of a dense model is active."""
    counts = parameter_counts(ModelConfig.model_validate({"preset": name}))
    assert counts["total"] / 1e9 == pytest.approx(total, rel=2e-3)
    assert counts["active"] / 1e9 == pytest.approx(active, rel=2e-2)  # the card rounds 3.353 down


def test_flops_follow_the_stated_convention() -> None:
    config = ModelConfig.model_validate({"preset": "7b"})
    products = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    assert flops_per_token(config, 4096) == 6 * products + 12 * 32 * 4096 * 4096
    tied = config.model_copy(update={"tie_embeddings": True})
    assert flops_per_token(tied, 4096) == flops_per_token(config, 4096)


def _grouped_flops(a_shape: tuple[int, ...], b_shape: tuple[int, ...], *_: object, **__: object) -> int:
    """Rows times a stack of matrices, or rows times rows, a group at a time: each row meets one group's matrix."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[-1]


MIXED = {"experts": 4, "experts_per_token": 2, "expert_ffn_size": 48, "shared_experts": 1, "first_layer": 1}


@pytest.mark.parametrize("moe", [None, MIXED])
def test_flops_are_those_torch_counts(moe: dict[str, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts two for each multiply-add of the products that run; its plain attention does not halve either. Of
    grouped products it knows nothing yet. Rows that only pad an expert's are no work, and left out here."""
    monkeypatch.setattr("model.token_rows.SLOT_MULTIPLE", 1)
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    shape = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_size": 96, "vocab_size": 256}
    config = ModelConfig.model_validate({**shape, "moe": moe})
    decoder, tokens = Decoder(config), torch.zeros(2, 32, dtype=torch.int64)
    grouped = {torch.ops.aten._grouped_mm: _grouped_flops}
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter, sdpa_kernel(SDPBackend.MATH):
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


def test_kinds_of_names() -> None:
    config = ModelConfig.model_validate({**DEEPSEEK_LIKE, "num_layers": 2})
    names = list(parameter_shapes(config)) + list(buffer_shapes(config))
    assert [name for name in names if is_expert(name)] == [
        f"layers.1.mlp.experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    ]
    router = ["layers.1.mlp.router.weight", "layers.1.mlp.router.bias"]
    assert [name for name in names if keeps_fp32(name)] == router
    assert is_decayed(router[0])
    assert is_decayed("layers.1.mlp.experts.up_proj")
    assert "layers.0.mlp.gate_proj.weight" in names
    assert buffer_shapes(ModelConfig.model_validate({"preset": "tiny-moe"})) == {}
