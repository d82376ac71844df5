"""Architectures by name: what `preset: NAME` stands for in a model's config."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # 10.2 M parameters with the 8k vocabulary: what two laptop cores train in minutes.
    "tiny-10m": {
        "hidden_size": 320,
        "num_layers": 6,
        "num_heads": 5,
        "ffn_size": 896,
        "vocab_size": 8192,
        "tie_embeddings": True,
    },
    # The same size in use: of 25.7 M parameters, a token meets 10.3 M.
    "tiny-moe": {
        "hidden_size": 320,
        "num_layers": 6,
        "num_heads": 5,
        "ffn_size": 896,
        "vocab_size": 8192,
        "tie_embeddings": True,
        "moe": {"experts": 8, "experts_per_token": 2, "expert_ffn_size": 448},
    },
    "58m": {"hidden_size": 512, "num_layers": 8, "num_heads": 8, "ffn_size": 1408, "vocab_size": 32000},
    # The shape of GPT-2 small and GPT-3 125M, with SwiGLU at the same number of parameters.
    "125m": {
        "hidden_size": 768,
        "num_layers": 12,
        "num_heads": 12,
        "ffn_size": 2048,
        "vocab_size": 50257,
        "tie_embeddings": True,
    },
    # Llama 3.2 1B.
    "1b": {
        "hidden_size": 2048,
        "num_layers": 16,
        "num_heads": 32,
        "num_kv_heads": 8,
        "ffn_size": 8192,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_embeddings": True,
    },
    # Llama 2 7B.
    "7b": {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "ffn_size": 11008, "vocab_size": 32000},
    # Llama 3 70B.
    "70b": {
        "hidden_size": 8192,
        "num_layers": 80,
        "num_heads": 64,
        "num_kv_heads": 8,
        "ffn_size": 28672,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    # Mixtral 8x7B (Jiang et al. 2024, arXiv 2401.04088). Every layer has experts: ffn_size is no layer's.
    "mixtral-8x7b": {
        "hidden_size": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "ffn_size": 14336,
        "vocab_size": 32000,
        "rope_theta": 1000000.0,
        "moe": {"experts": 8, "experts_per_token": 2, "expert_ffn_size": 14336, "balance_coefficient": 0.02},
    },
    # Qwen3 30B-A3B (Yang et al. 2025, arXiv 2505.09388).
    "qwen3-30b-a3b": {
        "hidden_size": 2048,
        "num_layers": 48,
        "num_heads": 32,
        "num_kv_heads": 4,
        "head_size": 128,
        "ffn_size": 6144,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
        "norm_eps": 1e-6,
        "qk_norm": True,
        "moe": {"experts": 128, "experts_per_token": 8, "expert_ffn_size": 768, "balance_coefficient": 0.001},
    },
}
