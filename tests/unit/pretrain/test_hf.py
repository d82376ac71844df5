"""Parity with transformers, function and names, and a real checkpoint; each refusal with an input that meets it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from model.config import ModelConfig
from model.decoder import Decoder
from model.kv_cache import KVCache
from pretrain.hf import config_from_hf, config_to_hf
from pretrain.hf_folder import HuggingFaceFolder
from pretrain.hf_weights import weights_from_hf, weights_to_hf
from tests.hf_parity import MIXTRAL, MOE, build, config, relative_error, theirs
from tests.smollm2 import smollm2, smollm2_tokenizer

LINEAR = {"type": "linear", "factor": 2.5}
LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS = {
    "gqa": {},
    "mha": {"num_kv_heads": 4},
    "wide heads": {"head_size": 32},
    "tied": {"tie_embeddings": True},
    "theta": {"rope_theta": 500000.0},
    "linear": {"rope_scaling": LINEAR},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN},
    "yarn, all given": {"rope_scaling": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.7}},
    "qwen3": {"qk_norm": True, "head_size": 32},
    "qwen3 tied, yarn": {"qk_norm": True, "tie_embeddings": True, "rope_scaling": YARN},
    "mixtral": MIXTRAL,
    "mixtral tied, wide heads": {**MIXTRAL, "tie_embeddings": True, "head_size": 32, "rope_theta": 1e6},
    "qwen3 moe": {"qk_norm": True, "head_size": 32, "moe": {**MOE, "experts_per_token": 3}},
    "qwen3 moe, unnormalized": {
        "qk_norm": True,
        "moe": {**MOE, "normalize_weights": False, "balance_coefficient": 0.5},
    },
    "qwen3 moe, some layers": {"qk_norm": True, "moe": {**MOE, "first_layer": 0, "layer_frequency": 2}},
    "qwen3 moe, last layer": {
        "qk_norm": True,
        "moe": {**MOE, "first_layer": 2, "balance": "none", "balance_coefficient": 0},
    },
}


def load_hf_folder(path: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    folder = HuggingFaceFolder(path)
    return folder.config, folder.weights()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_transformers(variant: str) -> None:
    decoder = build(config(**VARIANTS[variant]))
    tokens = torch.randint(0, 200, (2, 150), generator=torch.Generator().manual_seed(0))
    expected = theirs(decoder)(tokens).logits
    assert expected.std() > 0.3
    assert relative_error(decoder.logits(decoder.hidden(tokens)), expected) < 1e-5


@torch.no_grad()
def test_the_scalings_are_told_apart() -> None:
    """The parity above would be empty if a scaling made no difference at these lengths."""
    tokens = torch.randint(0, 200, (1, 150), generator=torch.Generator().manual_seed(0))
    logits = {}
    for name in ("gqa", "theta", "linear", "llama3", "yarn", "yarn, all given"):
        decoder = build(config(**VARIANTS[name]))
        logits[name] = decoder.logits(decoder.hidden(tokens))
    names = list(logits)
    for index, name in enumerate(names):
        for other in names[:index]:
            assert relative_error(logits[name], logits[other]) > 1e-3, (name, other)


def test_gradients_equal_transformers() -> None:
    decoder = build(config(tie_embeddings=True))
    tokens = torch.randint(0, 200, (2, 33), generator=torch.Generator().manual_seed(0))
    reference = theirs(decoder)
    reference(tokens, labels=tokens).loss.backward()
    (decoder(tokens[:, :-1], tokens[:, 1:]).total / 64).backward()
    expected = weights_from_hf({name: p.grad for name, p in reference.named_parameters()}, decoder.config)
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None
        assert relative_error(parameter.grad, expected[name]) < 1e-5, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant: str) -> None:
    decoder = build(config(**VARIANTS[variant]))
    hf = json.loads(json.dumps(config_to_hf(decoder.config)))
    assert config_from_hf(hf) == decoder.config
    weights = weights_from_hf(weights_to_hf(decoder.state_dict(), decoder.config), decoder.config)
    state = decoder.state_dict()
    assert list(weights) == list(state)
    for name, weight in weights.items():
        rows = decoder.config.vocab_size if name in ("embed_tokens.weight", "lm_head.weight") else None
        assert weight.shape == state[name].shape
        assert torch.equal(weight[:rows], state[name][:rows])
        assert rows is None or weight[rows:].count_nonzero() == 0


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_folder_that_transformers_wrote(variant: str, tmp_path: Path) -> None:
    """Sharded, and with whatever keys their own config writes; read back, and read by their Auto class."""
    decoder = build(config(**VARIANTS[variant]))
    theirs(decoder).save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded_config, weights = load_hf_folder(tmp_path)
    assert loaded_config == decoder.config
    loaded = Decoder(loaded_config)
    loaded.load_state_dict(weights)
    tokens = torch.randint(0, 200, (1, 50))
    assert torch.equal(loaded.hidden(tokens), decoder.hidden(tokens))


@pytest.mark.parametrize("fields", [{"rope_scaling": LLAMA3}, MIXTRAL, {"qk_norm": True, "moe": MOE}])
@torch.no_grad()
def test_a_folder_that_we_wrote(fields: dict[str, Any], tmp_path: Path) -> None:
    decoder = build(config(**fields)).bfloat16()
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(decoder.config, 4096, torch.bfloat16)))
    exported = weights_to_hf(decoder.state_dict(), decoder.config)
    save_file(exported, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded_config, weights = load_hf_folder(tmp_path)
    assert loaded_config == decoder.config
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(weights[name], tensor)
        assert weights[name].dtype == (torch.float32 if "router" in name else torch.bfloat16)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert reference.config.max_position_embeddings == 4096
    tokens = torch.randint(0, 200, (1, 100))
    decoder = decoder.float()
    assert relative_error(decoder.logits(decoder.hidden(tokens)), reference(tokens).logits) < 1e-5


def test_version_4_configs() -> None:
    """transformers 4 writes `rope_theta` and `rope_scaling`, and leaves defaults out."""
    old = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 200,
        "rope_theta": 500000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    read = config_from_hf(old)
    assert (read.num_kv_heads, read.head_size, read.norm_eps, read.rope_theta) == (4, 16, 1e-6, 500000.0)
    assert read.rope_scaling is not None
    assert read.rope_scaling.factor == 2.0
    yarn = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": True}
    read = config_from_hf({**old, "max_position_embeddings": 32, "rope_scaling": yarn})
    reference = LlamaConfig(**{**old, "max_position_embeddings": 32, "rope_scaling": yarn})
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from model.rope import attention_factor, inverse_frequencies

    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](reference)
    assert attention_factor(read) == pytest.approx(factor)
    torch.testing.assert_close(inverse_frequencies(read), frequencies)


GOOD = config_to_hf(config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama .*, qwen3"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported: our decoder computes 'silu' only"),
        ({"use_sliding_window": True}, "use_sliding_window True"),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "RoPE scaling 'longrope' is not supported; supported: default, linear",
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "low": 1}}, "'linear' with low is not supported"),
        ({"rope_parameters": {**YARN, "truncate": False}}, "'yarn' with truncate is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'default' with partial_rotary_factor is not supported"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
    ],
)
def test_what_our_decoder_does_not_compute_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_hf({**GOOD, **change})


def test_a_config_that_lacks_a_size() -> None:
    with pytest.raises(ValueError, match="lacks num_hidden_layers"):
        config_from_hf({key: value for key, value in GOOD.items() if key != "num_hidden_layers"})


def test_a_shape_that_transformers_refuses() -> None:
    with pytest.raises(ValueError, match="hidden_size 64 is not divisible by num_heads 5"):
        config_to_hf(config(num_heads=5, num_kv_heads=5, head_size=16))


def test_tensors_that_do_not_fit_the_config() -> None:
    decoder = build(config())
    good = weights_to_hf(decoder.state_dict(), decoder.config)
    down = "model.layers.2.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=r"lacks model\.layers\.2\.mlp\.down_proj\.weight"):
        weights_from_hf({name: weight for name, weight in good.items() if name != down}, decoder.config)
    with pytest.raises(ValueError, match=r"has model\.layers\.0\.self_attn\.q_proj\.bias"):
        weights_from_hf({**good, "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, decoder.config)
    with pytest.raises(ValueError, match=r"down_proj\.weight has shape \(64, 95\).* says \(64, 96\)"):
        weights_from_hf({**good, down: good[down][:, 1:]}, decoder.config)
    padded = decoder.state_dict()["embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has shape \(256, 64\).* says \(200, 64\)"):
        weights_from_hf({**good, "model.embed_tokens.weight": padded}, decoder.config)


def test_harmless_extra_tensors_are_left_out() -> None:
    decoder = build(config(tie_embeddings=True))
    good = weights_to_hf(decoder.state_dict(), decoder.config)
    extra = {
        "lm_head.weight": good["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    assert list(weights_from_hf({**good, **extra}, decoder.config)) == list(decoder.state_dict())


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_hf_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_hf_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load_hf_folder(tmp_path)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.safetensors is missing"):
        load_hf_folder(tmp_path)


@pytest.mark.slow
@torch.no_grad()
def test_a_real_checkpoint() -> None:
    """SmolLM2-135M: logits equal transformers', and greedy decoding with a cache answers a question of fact."""
    hf, weights = smollm2()
    reference = LlamaForCausalLM(LlamaConfig(**hf)).eval()
    assert reference.load_state_dict(weights, strict=False).missing_keys == ["lm_head.weight"]
    reference.tie_weights()
    model_config = config_from_hf(hf)
    with torch.device("meta"):
        decoder = Decoder(model_config)
    decoder.load_state_dict(weights_from_hf(weights, model_config), assign=True)

    tokenizer = smollm2_tokenizer()
    text = "The capital of France is"
    tokens = torch.tensor([tokenizer.encode(text + " a city that everyone should see once in their life.").ids])
    assert relative_error(decoder.logits(decoder.hidden(tokens)), reference(tokens).logits) < 1e-5
    assert decoder(tokens[:, :-1], tokens[:, 1:]).nll / (tokens.numel() - 1) < 4  # nats a token: it knows English

    unread, cache, written = torch.tensor([tokenizer.encode(text).ids]), KVCache(model_config, 1, 16), []
    for _ in range(3):
        unread = decoder.logits(decoder.hidden(unread, cache=cache)[:, -1:]).argmax(dim=-1)
        written.append(unread.item())
    assert tokenizer.decode(written).startswith(" Paris")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 3}, "num_heads 3 is not divisible by num_kv_heads"),
        ({"vocab_size": 0}, "vocab_size=0: Input should be greater than 0"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers='two': Input should be a valid integer"),
    ],
)
def test_a_config_of_no_model_is_one_line(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    stated = config_to_hf(config(num_kv_heads=2)) | change
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError, match="config.json: the Hugging Face config is no model's: ") as caught:
        HuggingFaceFolder(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
