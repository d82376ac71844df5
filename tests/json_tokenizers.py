"""Tokenizers as published models have them, made by the library that reads them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_pipeline.json_codec import KNOWN_PATTERNS

GPT2, LLAMA3, QWEN2, GPT4O = sorted(KNOWN_PATTERNS, key=lambda pattern: ("p{Lu}" in pattern, "(?i" in pattern, pattern))
BOS, EOS = "<|begin|>", "<|end|>"


def byte_level(pattern: str | None = None) -> pre_tokenizers.PreTokenizer:
    """GPT-2's own splitting into words, or that of a pattern, as bytes."""
    if pattern is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


SPLITS = {
    "gpt-2": byte_level(),
    "gpt-2 by its pattern": byte_level(GPT2),
    "llama 3": byte_level(LLAMA3),
    "qwen 2": byte_level(QWEN2),
    "gpt-4o": byte_level(GPT4O),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()]),
    "words": pre_tokenizers.Whitespace(),
    "bert": pre_tokenizers.BertPreTokenizer(),
}


def trained(
    texts: list[str],
    split: pre_tokenizers.PreTokenizer,
    normalizer: normalizers.Normalizer | None = None,
    vocab_size: int = 601,
) -> Tokenizer:
    """A byte-level BPE with BOS, EOS and one token that is found in a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $0", special_tokens=[(BOS, 0)])
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """A folder's `tokenizer.json`, with the `tokenizer_config.json` that names BOS and EOS."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "model_max_length": 2048, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"
