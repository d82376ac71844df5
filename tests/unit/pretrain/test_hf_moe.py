"""Experts by transformers' names: their gradients, old configs, and each refusal with an input that meets it. That
logits are equal, and folders both ways, is in `test_hf`, for all architectures alike."""

from typing import Any

import pytest
import torch

from pretrain.hf import config_from_hf, config_to_hf
from pretrain.hf_weights import weights_from_hf, weights_to_hf
from tests.hf_parity import MIXTRAL, MOE, build, config, relative_error, theirs


def test_gradients_of_experts_equal_transformers() -> None:
    decoder = build(config(**MIXTRAL))
    tokens = torch.randint(0, 200, (2, 33), generator=torch.Generator().manual_seed(0))
    reference = theirs(decoder)
    reference(tokens, labels=tokens).loss.backward()
    (decoder(tokens[:, :-1], tokens[:, 1:]).total / 64).backward()
    for ours, block in zip(decoder.layers, reference.model.layers, strict=True):
        gate_up = torch.cat([ours.mlp.experts.gate_proj.grad, ours.mlp.experts.up_proj.grad], dim=1)
        assert relative_error(gate_up, block.mlp.experts.gate_up_proj.grad) < 1e-5
        assert relative_error(ours.mlp.experts.down_proj.grad, block.mlp.experts.down_proj.grad) < 1e-5
        assert relative_error(ours.mlp.router.weight.grad, block.mlp.gate.weight.grad) < 1e-5


def test_version_4_configs_with_experts() -> None:
    """They leave defaults out, among them Mixtral's rope_theta; Qwen3-MoE's are of another model than its first."""
    shape = {
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "intermediate_size": 96,
        "vocab_size": 200,
    }
    mixtral = config_from_hf({**shape, "model_type": "mixtral"})
    assert (mixtral.num_kv_heads, mixtral.rope_theta, mixtral.norm_eps) == (8, 1e6, 1e-5)
    assert mixtral.moe is not None
    assert (mixtral.moe.experts, mixtral.moe.experts_per_token, mixtral.moe.expert_ffn_size) == (8, 2, 96)
    assert (mixtral.moe.normalize_weights, mixtral.moe.balance_coefficient) == (True, 0.001)
    qwen = {**shape, "model_type": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 4}
    read = config_from_hf(qwen)
    assert (read.num_kv_heads, read.rope_theta, read.norm_eps, read.qk_norm) == (4, 1e4, 1e-6, True)
    assert read.moe is not None
    assert (read.moe.experts, read.moe.expert_ffn_size, read.moe.normalize_weights) == (16, 768, False)
    for keys, first, frequency in (
        ({"decoder_sparse_step": 2}, 1, 2),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, 3, 2),
        ({"mlp_only_layers": [0, 1]}, 2, 1),
        ({"decoder_sparse_step": 6}, 5, 1),
    ):
        layers = config_from_hf({**qwen, **keys}).moe
        assert layers is not None
        assert (layers.first_layer, layers.layer_frequency) == (first, frequency), keys
    assert config_from_hf({**qwen, "decoder_sparse_step": 7}).moe is None


GOOD_MIXTRAL = config_to_hf(config(**MIXTRAL))
GOOD_QWEN3_MOE = config_to_hf(config(qk_norm=True, num_layers=6, moe=MOE))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({**GOOD_MIXTRAL, "sliding_window": 4096}, "sliding_window 4096 is not supported"),
        (
            {**GOOD_QWEN3_MOE, "mlp_only_layers": [2]},
            r"mlp_only_layers \[2\] with decoder_sparse_step 1 .* gives experts to layers 0, 1, 3, 4, 5",
        ),
        ({**GOOD_QWEN3_MOE, "decoder_sparse_step": 2, "mlp_only_layers": [5]}, "experts to layers 1, 3, our decoder"),
        ({**GOOD_QWEN3_MOE, "moe_intermediate_size": 36}, "expert_ffn_size 36 is not a multiple of 8"),
    ],
)
def test_experts_that_our_decoder_does_not_compute_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_hf(wrong)


@pytest.mark.parametrize(
    ("qk_norm", "change", "message"),
    [
        (False, {"router": "sigmoid"}, "moe.router 'sigmoid' has no counterpart in transformers' mixtral"),
        (False, {"normalize_weights": False}, "moe.normalize_weights False .* computes True only"),
        (False, {"first_layer": 1}, "moe.first_layer 1 .* computes 0 only"),
        (False, {"layer_frequency": 2}, "moe.layer_frequency 2 .* computes 1 only"),
        (True, {"shared_experts": 1}, "moe.shared_experts 1 has no counterpart in transformers' qwen3_moe"),
        (True, {"routed_scaling_factor": 2.5}, "moe.routed_scaling_factor 2.5"),
        (True, {"balance": "bias"}, "moe.balance 'bias' has no counterpart"),
        (True, {"groups": 2}, "moe.groups_per_token 1 has no counterpart"),
    ],
)
def test_experts_that_transformers_does_not_compute(qk_norm: bool, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_to_hf(config(qk_norm=qk_norm, moe={**MOE, **change}))


def test_tensors_of_experts_that_do_not_fit_the_config() -> None:
    decoder = build(config(**MIXTRAL))
    good = weights_to_hf(decoder.state_dict(), decoder.config)
    down = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.block_sparse_moe\.experts\.3\.w2\.weight:"):
        weights_from_hf({name: weight for name, weight in good.items() if name != down}, decoder.config)
    with pytest.raises(ValueError, match=r"experts\.3\.w2\.weight has shape \(64, 88\), .* says \(64, 96\)"):
        weights_from_hf({**good, down: good[down][:, 8:]}, decoder.config)
    with pytest.raises(ValueError, match=r"has model\.layers\.1\.block_sparse_moe\.experts\.4\.w2\.weight"):
        weights_from_hf({**good, down.replace("3", "4"): good[down]}, decoder.config)
