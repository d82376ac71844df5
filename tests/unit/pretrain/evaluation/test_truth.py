"""Scores equal a plain loop of transformers: on a real model, on mixtures of experts, on GPT-2 and NeoX."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from data_pipeline.tokenizer_training import train_tokenizer
from pretrain.evaluation.windows import Windowing
from pretrain.load_model import LoadedModel, load_model
from tests.plain_scoring import in_memory, our_scores, plain_nats
from tests.smollm2 import smollm2, smollm2_tokenizer
from tests.tiny_hf import TEXTS, VOCAB_SIZE

REAL_TEXTS = [
    "The steppe is a belt of grassland that extends some five thousand miles from Hungary in the west to Manchuria.\n",
    "def fibonacci(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "草原上的天气变化无常，冬天十分寒冷。🐎🌾 Ветер в степи 🌬️",
]
SMALL: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_key_value_heads": 2, "initializer_range": 0.2}
BUILD = {
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SMALL, **EXPERTS, intermediate_size=48, num_local_experts=4, max_position_embeddings=64)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SMALL,
            **EXPERTS,
            intermediate_size=48,
            moe_intermediate_size=24,
            num_experts=4,
            head_dim=8,
            max_position_embeddings=64,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SMALL, intermediate_size=48, max_position_embeddings=64, initializer_range=0.2)
    ),
}


def agrees(
    model: LoadedModel, theirs: PreTrainedModel, texts: list[str], window: int | Literal["document"], stride: int | None
) -> None:
    """Each document's nats are theirs, all texts scored together here and one by one there."""
    start, _ = model.start_token
    eos = model.tokenizer.eos_id
    assert eos is not None
    found = our_scores(model, in_memory(texts), Windowing.of(model.context_length, window, stride))
    for text, score in zip(texts, found.values(), strict=True):
        ids = [start, *model.tokenizer.encode(text), eos]
        assert score.tokens == len(ids) - 1
        assert score.nats == pytest.approx(plain_nats(theirs, ids, window, stride), rel=1e-5)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("smollm2")
    config, weights = smollm2()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    smollm2_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("window", "stride"), [(32, 32), (24, 7), (16, 8), ("document", None)])
def test_a_real_model(real: Path, window: int | Literal["document"], stride: int | None) -> None:
    agrees(*loaded_both(real), REAL_TEXTS, window, stride)


@functools.cache
def loaded_both(folder: Path) -> tuple[LoadedModel, PreTrainedModel]:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return load_model(folder), theirs.eval()


@pytest.mark.parametrize("kind", sorted(BUILD))
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    BUILD[kind]().save_pretrained(tmp_path)
    train_tokenizer(TEXTS, VOCAB_SIZE, tmp_path / "tokenizer.model")
    model, theirs = loaded_both(tmp_path)
    windows: list[tuple[int | Literal["document"], int | None]] = [(64, 64), (48, 11)]
    if model.longest_context is None:
        windows.append(("document", None))
    for window, stride in windows:
        agrees(model, theirs, TEXTS, window, stride)


def test_learned_positions_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    BUILD["gpt2"]().save_pretrained(tmp_path)
    train_tokenizer(TEXTS, VOCAB_SIZE, tmp_path / "tokenizer.model")
    model = load_model(tmp_path)
    assert model.longest_context == 64
    with pytest.raises(ValueError, match="sees at most 64 at once"):
        our_scores(model, in_memory(TEXTS), Windowing.of(64, "document"))
    assert our_scores(replace(model, longest_context=None), in_memory(["a b"]), Windowing.of(64, "document"))
