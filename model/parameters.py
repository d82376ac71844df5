"""The parameters of a decoder by logical name, from its config alone: no torch here."""

from model.config import ModelConfig, has_experts, padded_vocab_size

VOCABULARY_PARAMETERS = ("embed_tokens.weight", "lm_head.weight")


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's logical name and full shape, in the decoder's own order; the vocabulary is padded."""
    D, h = config.hidden_size, config.head_size
    H, K = config.num_heads, config.num_kv_heads
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (H * h, D),
        "self_attn.k_proj.weight": (K * h, D),
        "self_attn.v_proj.weight": (K * h, D),
        "self_attn.o_proj.weight": (D, H * h),
        **({"self_attn.q_norm.weight": (h,), "self_attn.k_norm.weight": (h,)} if config.qk_norm else {}),
        "post_attention_layernorm.weight": (D,),
    }
    Vp = padded_vocab_size(config.vocab_size)
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (Vp, D)}
    for layer in range(config.num_layers):
        mlp = _moe_shapes(config) if has_experts(config, layer) else _mlp_shapes(D, config.ffn_size)
        shapes.update({f"layers.{layer}.{name}": shape for name, shape in block.items()})
        shapes.update({f"layers.{layer}.mlp.{name}": shape for name, shape in mlp.items()})
    shapes["norm.weight"] = (D,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (Vp, D)
    return shapes


def buffer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What belongs to a trained model besides its parameters, by name: no gradient moves it. All zero at start."""
    if config.moe is None or config.moe.balance != "bias":
        return {}
    layers = (layer for layer in range(config.num_layers) if has_experts(config, layer))
    return {f"layers.{layer}.mlp.router.bias": (config.moe.experts,) for layer in layers}


def is_norm(name: str) -> bool:
    """Whether the parameter is the gain of a norm."""
    return name.endswith("norm.weight")


def is_decayed(name: str) -> bool:
    """Whether weight decay applies: to every matrix product's weight, not to norms nor to the embedding.

    A tied head is the embedding, and is spared with it. A router is a matrix like any other, as in Megatron-LM, which
    decays all that has two dimensions: it keeps the logits, and with them the sharpness of the choice, from growing.
    """
    return not is_norm(name) and name != "embed_tokens.weight"


def is_block_matrix(name: str, dimensions: int) -> bool:
    """Whether the parameter is a matrix of a layer, or a stack of them, and not a router: what Muon updates."""
    return name.startswith("layers.") and dimensions > 1 and not keeps_fp32(name)


def is_expert(name: str) -> bool:
    """Whether the parameter stacks the experts of a layer along its first dimension."""
    return ".mlp.experts." in name


def keeps_fp32(name: str) -> bool:
    """Whether a parameter or buffer stays fp32 at any precision: a router's, whose choice is a hard one, so that
    rounding would send tokens elsewhere (Switch Transformer, Fedus et al. 2021, arXiv 2101.03961, section 2.4)."""
    return ".mlp.router." in name


def _mlp_shapes(D: int, F: int) -> dict[str, tuple[int, ...]]:
    return {"gate_proj.weight": (F, D), "up_proj.weight": (F, D), "down_proj.weight": (D, F)}


def _moe_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    assert config.moe is not None
    D, E, F = config.hidden_size, config.moe.experts, config.moe.expert_ffn_size
    shapes: dict[str, tuple[int, ...]] = {
        "router.weight": (E, D),
        "experts.gate_proj": (E, F, D),
        "experts.up_proj": (E, F, D),
        "experts.down_proj": (E, D, F),
    }
    if config.moe.shared_experts:
        shared = _mlp_shapes(D, config.moe.shared_experts * F)
        shapes.update({f"shared_experts.{name}": shape for name, shape in shared.items()})
    return shapes
