"""Parameters and floating-point operations from the config alone: no torch here."""

from math import prod

from model.config import ModelConfig
from model.parameters import VOCABULARY_PARAMETERS, is_expert, is_norm, parameter_shapes

ITEMS = ("embedding", "attention", "ffn", "router", "experts", "norms", "head")


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by item: `embedding`, `attention`, `ffn`, `router`, `experts`, `norms`, `head`; and `total`,
    `non_embedding`, `active`.

    Convention: what a published table counts. Rows that only pad the vocabulary are left out. A tied head counts 0,
    its weight being the embedding's. `ffn` counts shared experts, which every token takes, `experts` all the routed
    ones. `non_embedding` leaves out both the embedding and the head (Kaplan et al. 2020, arXiv 2001.08361, section
    2.1). `active` is the total with only the experts that a token takes (Mixtral, arXiv 2401.04088, section 2.1).
    """
    counts = dict.fromkeys(ITEMS, 0)
    for name, shape in parameter_shapes(config).items():
        size = config.vocab_size * config.hidden_size if name in VOCABULARY_PARAMETERS else prod(shape)
        counts[_item(name)] += size
    total = sum(counts.values())
    return {
        **counts,
        "total": total,
        "non_embedding": total - counts["embedding"] - counts["head"],
        "active": total - counts["experts"] + _active_experts(config, counts["experts"]),
    }


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Model floating-point operations of one token's forward and backward pass, for MFU.

    Convention of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): 6 a parameter of a matrix product, and
    12 L H head_size T for attention's two products, with no halving for causality. The head counts, tied or not; the
    embedding's look-up, norms and recomputation do not. Rows that only pad the vocabulary do not. Of the experts only
    those that a token takes count.

    sequence_length: tokens T that attention spans.
    """
    counts = parameter_counts(config)
    matmul_parameters = counts["active"] - counts["embedding"] - counts["norms"] - counts["head"]
    matmul_parameters += config.vocab_size * config.hidden_size
    attention = 12 * config.num_layers * config.num_heads * config.head_size * sequence_length
    return 6 * matmul_parameters + attention


def _active_experts(config: ModelConfig, parameters: int) -> int:
    return 0 if config.moe is None else parameters // config.moe.experts * config.moe.experts_per_token


def _item(name: str) -> str:
    if is_norm(name):
        return "norms"
    if ".self_attn." in name:
        return "attention"
    if is_expert(name):
        return "experts"
    if ".mlp.router." in name:
        return "router"
    if ".mlp." in name:
        return "ffn"
    return {"embed_tokens.weight": "embedding", "lm_head.weight": "head"}[name]
