"""Models that our decoder does not compute: the same numbers as transformers' own forward, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
)

import pretrain.transformers_model
from data_pipeline.batch import IGNORED_TARGET
from data_pipeline.tokenizer_training import train_tokenizer
from pretrain.language_model import OwnModel
from pretrain.load_model import LoadedModel, load_model
from pretrain.transformers_model import TransformersModel
from tests.tiny_hf import TEXTS, VOCAB_SIZE

GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}
COMMON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 64}
WIDE = {**COMMON, "intermediate_size": 64}
GROUPED = {**WIDE, "num_key_value_heads": 1}
# Architectures, and settings of ours that our decoder does not compute; with the most tokens they see at once.
CONFIGS = {
    "gpt2": (GPT2Config(vocab_size=VOCAB_SIZE, initializer_range=0.2, **GPT2), 64),
    "gptj": (GPTJConfig(vocab_size=VOCAB_SIZE, initializer_range=0.2, rotary_dim=8, **GPT2), 64),
    "opt": (OPTConfig(vocab_size=VOCAB_SIZE, init_std=0.2, ffn_dim=64, word_embed_proj_dim=16, **COMMON), 64),
    "gpt_neox": (GPTNeoXConfig(vocab_size=VOCAB_SIZE, initializer_range=0.2, **WIDE), None),
    "phi": (PhiConfig(vocab_size=VOCAB_SIZE, initializer_range=0.2, **WIDE), None),
    "gemma2": (
        Gemma2Config(vocab_size=VOCAB_SIZE, initializer_range=0.2, head_dim=16, sliding_window=8, **GROUPED),
        None,
    ),
    "llama with biases": (LlamaConfig(vocab_size=VOCAB_SIZE, initializer_range=0.2, attention_bias=True, **WIDE), None),
    "mixtral with a window": (
        MixtralConfig(vocab_size=VOCAB_SIZE, initializer_range=0.2, num_local_experts=4, sliding_window=8, **GROUPED),
        None,
    ),
    "qwen3 with a window": (
        Qwen3Config(
            vocab_size=VOCAB_SIZE,
            initializer_range=0.2,
            head_dim=16,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
            **GROUPED,
        ),
        None,
    ),
}


def write(folder: Path, config: Any, tokenizer: Path) -> Any:
    """A random model of a config with a tokenizer beside it; returns transformers' own."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS, VOCAB_SIZE, path)
    return path


@pytest.fixture
def gpt2(tmp_path: Path, tokenizer: Path) -> Path:
    write(tmp_path / "gpt2", CONFIGS["gpt2"][0], tokenizer)
    return tmp_path / "gpt2"


def batch() -> tuple[Tensor, Tensor]:
    """Rows of 40, 30 and 20 tokens padded on the right; of the first, the first half is context only."""
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(3, VOCAB_SIZE, (3, 40), generator=generator)
    targets_BT = torch.randint(3, VOCAB_SIZE, (3, 40), generator=generator)
    targets_BT[0, :20] = IGNORED_TARGET
    for row, length in ((1, 30), (2, 20)):
        tokens_BT[row, length:], targets_BT[row, length:] = 0, IGNORED_TARGET
    return tokens_BT, targets_BT


@torch.no_grad()
def own_losses(model: Any, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Each row by itself and without its padding."""
    losses_BT = torch.zeros(tokens_BT.shape)
    for row, targets_T in enumerate(targets_BT):
        counted = (targets_T != IGNORED_TARGET).nonzero().flatten()
        logits_TV = model(tokens_BT[row : row + 1, : counted[-1] + 1]).logits[0].float()
        losses_BT[row, counted] = functional.cross_entropy(logits_TV[counted], targets_T[counted], reduction="none")
    return losses_BT


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_logits_are_transformers(name: str, tmp_path: Path, tokenizer: Path) -> None:
    config, longest = CONFIGS[name]
    theirs = write(tmp_path, config, tokenizer)
    loaded = load_model(tmp_path)
    assert isinstance(loaded.model, TransformersModel)
    assert (loaded.context_length, loaded.longest_context, loaded.step) == (64, longest, None)
    assert loaded.notes[0].startswith(f"computed by transformers' {type(theirs).__name__}")
    assert ("is not supported: our decoder" in loaded.notes[0]) == (" with" in name)
    tokens_BT, targets_BT = batch()
    losses_BT = loaded.model.token_losses(tokens_BT, targets_BT)
    torch.testing.assert_close(losses_BT, own_losses(theirs, tokens_BT, targets_BT), rtol=1e-5, atol=1e-5)
    at_BT = targets_BT != IGNORED_TARGET
    with torch.no_grad():
        expected = theirs(tokens_BT).logits[at_BT]
    torch.testing.assert_close(loaded.model.logits_at(tokens_BT, at_BT), expected, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.model.model.parameters())


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "mixtral with a window"])
def test_offloaded_they_are_the_same_bits(name: str, offload: Any, tmp_path: Path, tokenizer: Path) -> None:
    write(tmp_path, CONFIGS[name][0], tokenizer)
    for dtype in (torch.float32, torch.bfloat16):
        resident, offloaded = load_model(tmp_path, dtype=dtype), load_model(tmp_path, dtype=dtype, offload=offload)
        assert torch.equal(offloaded.model.token_losses(*batch()), resident.model.token_losses(*batch()))
        assert offloaded.fingerprint == resident.fingerprint
        inner = dict(offloaded.model.model.named_parameters())  # type: ignore[attr-defined]
        assert {p.device.type for key, p in inner.items() if ".1." in key} == {"meta" if offload == "disk" else "cpu"}
        assert {p.device.type for key, p in inner.items() if "embed" in key or "wte" in key} == {"cpu"}


def test_logits_stay_bounded_and_rows_without_a_target_cost_none(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(gpt2).model
    assert isinstance(model, TransformersModel)
    tokens_BT, targets_BT = batch()
    expected = model.token_losses(tokens_BT, targets_BT).clone()
    sizes: list[int] = []
    model.model.register_forward_hook(lambda _, inputs, output: sizes.append(output.logits.numel()))
    targets_BT[:, :25] = IGNORED_TARGET
    expected[:, :25] = 0
    monkeypatch.setattr(pretrain.transformers_model, "LOGITS", 2 * 15 * VOCAB_SIZE)
    torch.testing.assert_close(model.token_losses(tokens_BT, targets_BT), expected, rtol=1e-5, atol=1e-5)
    assert sizes == [2 * 15 * VOCAB_SIZE, 15 * VOCAB_SIZE]
    nothing = torch.full_like(targets_BT, IGNORED_TARGET)
    assert not model.token_losses(tokens_BT, nothing).any()
    assert model.logits_at(tokens_BT, nothing != IGNORED_TARGET).shape == (0, VOCAB_SIZE)
    assert len(sizes) == 2


def test_published_files_of_gpt2_lack_a_prefix(gpt2: Path) -> None:
    expected = load_model(gpt2).model.token_losses(*batch())
    tensors = load_file(gpt2 / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, gpt2 / "model.safetensors", metadata={"format": "pt"})
    for offload in (None, "disk"):
        assert torch.equal(load_model(gpt2, offload=offload).model.token_losses(*batch()), expected)


def test_a_fingerprint_is_of_all_weights_and_the_config(gpt2: Path) -> None:
    tensors = load_file(gpt2 / "model.safetensors")
    found = [load_model(gpt2).fingerprint, load_model(gpt2, dtype=torch.bfloat16).fingerprint]
    assert found[0] == found[1]
    tensors["transformer.h.2.mlp.c_fc.weight"][-1, -1] += 1
    save_file(tensors, gpt2 / "model.safetensors", metadata={"format": "pt"})
    found.append(load_model(gpt2).fingerprint)
    edit_config(gpt2, layer_norm_epsilon=1e-3)
    found.append(load_model(gpt2).fingerprint)
    assert len(set(found)) == 3


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def refused(folder: Path, message: str, offloads: tuple[str | None, ...] = (None, "disk")) -> None:
    for offload in offloads:
        with pytest.raises(ValueError, match=message) as error:
            load_model(folder, offload=offload)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


def test_what_cannot_be_computed_is_refused(gpt2: Path) -> None:
    edit_config(gpt2, model_type="nothing", auto_map={"AutoModelForCausalLM": "code.Model"})
    refused(gpt2, "model_type 'nothing' is not supported, .*: code that comes with a model is never run")
    edit_config(gpt2, auto_map=None, model_type="t5")
    refused(gpt2, "t5 is no type of causal language model")
    edit_config(gpt2, model_type="gpt2", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(gpt2, "has quantized weights")
    edit_config(gpt2, quantization_config=None, n_embd="wide")
    refused(gpt2, "config.json: transformers refuses it: .*n_embd")


def test_weights_beside_those_that_are_checked_are_not_computed_with(gpt2: Path) -> None:
    expected = load_model(gpt2)
    weights, index = gpt2 / "model.safetensors", gpt2 / "model.safetensors.index.json"
    tensors = load_file(weights)
    weights.rename(gpt2 / "first.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "first.safetensors")}))
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    for offload in (None, "disk"):
        found = load_model(gpt2, offload=offload)  # type: ignore[arg-type]
        assert found.fingerprint == expected.fingerprint
        assert torch.equal(found.model.token_losses(*batch()), expected.model.token_losses(*batch()))
    for other in ("adapter_model.bin", "model.safetensors"):
        edit_config(gpt2, transformers_weights=other)
        refused(gpt2, f"names '{other}' as its weights .*only model.safetensors.index.json is read")
    edit_config(gpt2, transformers_weights=None)
    (gpt2 / "adapter_config.json").write_text("{}")
    refused(gpt2, "has an adapter beside its weights .*merge the two, or remove it")


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    write(tmp_path, BertConfig(vocab_size=VOCAB_SIZE, **WIDE), tokenizer)
    refused(tmp_path, "depend on later tokens: it is no causal language model", offloads=(None,))


def test_weights_that_do_not_fit_are_refused(gpt2: Path) -> None:
    file = gpt2 / "model.safetensors"
    good, name = load_file(file), "transformer.h.1.mlp.c_fc.weight"
    for changed, message in (
        ({key: good[key] for key in good if key != name}, f"do not belong together: missing_keys {name}"),
        ({**good, name: torch.zeros(3, 5)}, "transformers cannot (load|compute) it: "),
        ({**good, name: good[name].clone().fill_(torch.nan)}, f"{name} holds 4096 values that are NaN or infinite"),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        refused(gpt2, message)
    file.rename(gpt2 / "pytorch_model.bin")
    refused(gpt2, "weights in pickle files only")


def test_a_tokenizer_of_another_size_is_refused(gpt2: Path, tmp_path: Path) -> None:
    train_tokenizer(TEXTS, VOCAB_SIZE + 10, tmp_path / "large.model")
    with pytest.raises(ValueError, match="has 410 tokens, but the vocabulary of .* has 400"):
        load_model(gpt2, tokenizer=tmp_path / "large.model")


def test_a_vocabulary_padded_by_its_makers_is_taken_with_the_tokenizer_beside_it(
    tmp_path: Path, tokenizer: Path
) -> None:
    """Phi's 50,295 tokens in 51,200 rows: as the folder has it, but not with a tokenizer from elsewhere."""
    write(tmp_path, GPT2Config(vocab_size=1024, **GPT2), tokenizer)
    loaded: LoadedModel = load_model(tmp_path)
    assert (loaded.tokenizer.vocab_size, loaded.model.vocab_size) == (VOCAB_SIZE, 1024)
    with pytest.raises(ValueError, match="has 400 tokens, but the vocabulary of .* has 1024"):
        load_model(tmp_path, tokenizer=tokenizer)


def test_what_our_decoder_computes_it_does_compute(tmp_path: Path, tokenizer: Path) -> None:
    write(tmp_path, LlamaConfig(vocab_size=VOCAB_SIZE, **WIDE), tokenizer)
    loaded = load_model(tmp_path)
    assert isinstance(loaded.model, OwnModel)
    assert loaded.notes == ()
