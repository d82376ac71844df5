"""The parameters of a decoder by logical name, from its config alone: no torch here."""

from model.config import ModelConfig, padded_vocab_size

VOCABULARY_PARAMETERS = ("embed_tokens.weight", "lm_head.weight")


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's logical name and full shape, in the decoder's own order; the vocabulary is padded."""
    D, F, h = config.hidden_size, config.ffn_size, config.head_size
    H, K = config.num_heads, config.num_kv_heads
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (H * h, D),
        "self_attn.k_proj.weight": (K * h, D),
        "self_attn.v_proj.weight": (K * h, D),
        "self_attn.o_proj.weight": (D, H * h),
        **({"self_attn.q_norm.weight": (h,), "self_attn.k_norm.weight": (h,)} if config.qk_norm else {}),
        "post_attention_layernorm.weight": (D,),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
    }
    Vp = padded_vocab_size(config.vocab_size)
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (Vp, D)}
    for layer in range(config.num_layers):
        shapes.update({f"layers.{layer}.{name}": shape for name, shape in block.items()})
    shapes["norm.weight"] = (D,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (Vp, D)
    return shapes


def is_norm(name: str) -> bool:
    """Whether the parameter is the gain of a norm."""
    return name.endswith("norm.weight")


def is_decayed(name: str) -> bool:
    """Whether weight decay applies: to every matrix product's weight, not to norms nor to the embedding.

    A tied head is the embedding, and is spared with it.
    """
    return not is_norm(name) and name != "embed_tokens.weight"
