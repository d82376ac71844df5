"""The architecture's config: presets, derived fields, and each rule with an input that breaks it."""

import subprocess
import sys

import pytest

from model.config import ModelConfig, has_experts, padded_vocab_size
from model.presets import PRESETS

SMALL = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_size": 96, "vocab_size": 200}
LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


MOE = {"experts": 8, "experts_per_token": 2, "expert_ffn_size": 32}


def test_derived_fields_are_numbers_in_the_dump() -> None:
    config = ModelConfig.model_validate({**SMALL, "num_kv_heads": None})
    assert (config.num_kv_heads, config.head_size) == (4, 16)
    assert None not in [config.model_dump()[key] for key in ("num_kv_heads", "head_size")]
    assert ModelConfig.model_validate(config.model_dump()) == config
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


def test_a_preset_is_overridden_field_by_field() -> None:
    config = ModelConfig.model_validate({"preset": "70b", "vocab_size": 1000, "rope_scaling": LLAMA3})
    assert config.hidden_size == 8192
    assert config.num_kv_heads == 8
    assert config.vocab_size == 1000
    assert config.rope_scaling is not None
    assert config.rope_scaling.type == "llama3"


def test_experts_of_a_preset_are_overridden_field_by_field() -> None:
    changed = ModelConfig.model_validate({"preset": "tiny-moe", "moe": {"experts": 4, "z_loss": 0.001}}).moe
    assert changed is not None
    assert (changed.experts, changed.expert_ffn_size, changed.z_loss) == (4, 448, 0.001)
    assert ModelConfig.model_validate({"preset": "tiny-moe", "moe": None}).moe is None
    assert ModelConfig.model_validate({"preset": "tiny-10m", "moe": MOE}).moe is not None
    assert ModelConfig.model_validate({**SMALL, "moe": None}).moe is None
    config = ModelConfig.model_validate({**SMALL, "moe": MOE})
    assert ModelConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("first_layer", "layer_frequency", "expected"),
    [(0, 1, [0, 1, 2, 3, 4]), (1, 2, [1, 3]), (3, 1, [3, 4]), (4, 9, [4])],
)
def test_which_layers_have_experts(first_layer: int, layer_frequency: int, expected: list[int]) -> None:
    moe = {**MOE, "first_layer": first_layer, "layer_frequency": layer_frequency}
    config = ModelConfig.model_validate({**SMALL, "num_layers": 5, "moe": moe})
    assert [layer for layer in range(5) if has_experts(config, layer)] == expected
    assert not has_experts(ModelConfig.model_validate(SMALL), 0)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name: str) -> None:
    assert ModelConfig.model_validate({"preset": name}).head_size in (64, 128)


def test_head_size_need_not_be_the_width_over_the_heads() -> None:
    assert ModelConfig.model_validate({**SMALL, "num_heads": 5, "head_size": 32}).head_size == 32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"preset": "7B"}, "unknown model preset '7B'; did you mean '7b'"),
        ({"preset": ["7b"]}, "unknown model preset"),
        (
            {**SMALL, "num_heads": 5},
            "hidden_size 64 is not divisible by num_heads 5; choose a multiple, or give head_size",
        ),
        ({**SMALL, "num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
        ({**SMALL, "head_size": 15}, "head_size 15 is odd"),
        ({**SMALL, "num_layers": 0}, "num_layers\n  Input should be greater than 0"),
        ({**SMALL, "num_heads": "many"}, "1 validation error"),
        ({**SMALL, "hidden_dim": 64}, "hidden_dim\n  Extra inputs are not permitted"),
        ({**SMALL, "rope_theta": 0}, "rope_theta\n  Input should be greater than 0"),
        ({**SMALL, "rope_scaling": {"type": "ntk", "factor": 2}}, "'linear', 'llama3', 'yarn'"),
        ({**SMALL, "rope_scaling": {"type": "linear", "factor": 0.5}}, "greater than or equal to 1"),
        (
            {**SMALL, "rope_scaling": {**LLAMA3, "low_freq_factor": 5.0}},
            "low_freq_factor 5 must be below high_freq_factor 4",
        ),
        (
            {
                **SMALL,
                "rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 8, "beta_slow": 40},
            },
            "beta_slow 40 must be below beta_fast 32",
        ),
        ("7b", "valid dictionary"),
        ({**SMALL, "moe": {**MOE, "experts_per_token": 9}}, "experts_per_token 9 is more than experts 8"),
        ({**SMALL, "moe": {**MOE, "groups": 3}}, "groups 3 does not divide experts 8"),
        ({**SMALL, "moe": {**MOE, "groups_per_token": 2}}, "groups_per_token 2 is more than groups 1"),
        (
            {**SMALL, "moe": {**MOE, "groups": 8}},
            "experts_per_token 2 is more than the 1 experts of a token's groups_per_token 1",
        ),
        ({**SMALL, "moe": {**MOE, "experts_per_token": 1}}, "set normalize_weights to false"),
        ({**SMALL, "moe": {**MOE, "expert_ffn_size": 36}}, "expert_ffn_size 36 is not a multiple of 8"),
        ({**SMALL, "hidden_size": 60, "head_size": 16, "moe": MOE}, "hidden_size 60 is not a multiple of 8"),
        ({**SMALL, "moe": {**MOE, "first_layer": 2}}, "moe.first_layer 2 leaves no layer with experts"),
        ({**SMALL, "moe": {**MOE, "layer_frequency": 0}}, "moe.layer_frequency\n  Input should be greater than 0"),
        ({**SMALL, "moe": {**MOE, "router": "top"}}, "'softmax' or 'sigmoid'"),
        ({**SMALL, "moe": {**MOE, "balance": "loss"}}, "'aux_loss', 'bias' or 'none'"),
        ({**SMALL, "moe": {**MOE, "z_loss": -1}}, "greater than or equal to 0"),
        ({**SMALL, "moe": {"experts": 8}}, "moe.experts_per_token\n  Field required"),
        ({**SMALL, "moe": {**MOE, "expert": 8}}, "moe.expert\n  Extra inputs are not permitted"),
    ],
)
def test_a_broken_rule_is_named(wrong: object, message: str) -> None:
    with pytest.raises(ValueError, match="validation error") as error:
        ModelConfig.model_validate(wrong)
    assert message in str(error.value)


def test_the_vocabulary_is_padded_to_a_multiple_of_128() -> None:
    assert [padded_vocab_size(size) for size in (1, 128, 129, 50257, 128256)] == [128, 128, 256, 50304, 128256]


def test_planning_needs_no_torch() -> None:
    code = "import model.accounting, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
