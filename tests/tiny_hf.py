"""A tiny random Llama, saved by transformers as a Hugging Face folder with a sentencepiece tokenizer beside it."""

from pathlib import Path

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_training import train_tokenizer

VOCAB_SIZE = 400
TEXTS = [
    "def add(a, b):\n    return a + b\n\n\nclass Adder:\n    def __call__(self, a, b):\n        return add(a, b)\n",
    "The steppe is a grassland plain without trees apart from those near rivers and lakes. " * 12,
    "for i in range(10):\n    for j in range(i):\n        print(i, j)\n" * 9,
    "草原は広い。" * 20 + " naïve café\n\n\tindented by a tab",
]


def tiny_hf_folder(folder: Path, seed: int = 0, tie: bool = False, max_positions: int = 64) -> Path:
    """Write config.json, model.safetensors and tokenizer.model; returns the folder."""
    train_tokenizer(TEXTS, VOCAB_SIZE, folder / "tokenizer.model")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        initializer_range=0.2,  # random, yet far from uniform, so that errors show
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    assert Tokenizer(folder / "tokenizer.model").vocab_size == VOCAB_SIZE
    return folder


def tokenizer_without(path: Path, bos_id: int = 1, eos_id: int = 2) -> Tokenizer:
    """A tokenizer of the same size that lacks BOS or EOS (-1), as some published models do."""
    ids = {name: at for at, name in enumerate(n for n, i in (("bos_id", bos_id), ("eos_id", eos_id)) if i >= 0)}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        minloglevel=2,
        **{"unk_id": 0, "pad_id": -1, "bos_id": -1, "eos_id": -1, **{name: at + 1 for name, at in ids.items()}},
    )
    return Tokenizer(path)
