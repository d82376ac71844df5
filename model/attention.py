"""Causal grouped-query self-attention.

B batch, T new tokens, S tokens attended to, D model width, H query heads, K key and value heads, h head size.
"""

from typing import TypeAlias

from torch import Tensor, nn
from torch.nn import functional

from model.config import ModelConfig
from model.kv_cache import LayerCache
from model.norm import RMSNorm
from model.rope import Rotate, rotate

# What a core takes: (B or 1, 1, T, S) bool, true where a query sees a key, or another core's own form of it.
Mask: TypeAlias = object


def causal_document_mask(document_ids_BT: Tensor) -> Tensor:
    """Which keys each token sees: those of its own document up to itself, (B, 1, T, T) bool."""
    same_BTT = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    return same_BTT.tril()[:, None]


class CausalAttention(nn.Module):
    """softmax(q k^T / sqrt(h)) v, without parameters: a module, so that it can be given other heads from outside."""

    def forward(self, q_BTHh: Tensor, k_BSKh: Tensor, v_BSKh: Tensor, mask: Tensor | None = None) -> Tensor:
        """q (B, T, H, h), k and v (B, S, K, h) -> (B, T, H, h); mask: a dense one, or None as in `Attention`."""
        q_BHTh, k_BKSh, v_BKSh = (x.transpose(1, 2) for x in (q_BTHh, k_BSKh, v_BSKh))
        out_BHTh = functional.scaled_dot_product_attention(
            q_BHTh,
            k_BKSh,
            v_BKSh,
            attn_mask=mask,
            is_causal=mask is None and q_BHTh.size(2) == k_BKSh.size(2),
            enable_gqa=q_BHTh.size(1) != k_BKSh.size(1),
        )
        return out_BHTh.transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) with RoPE, and RMSNorm on q and k if asked."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        q_size, kv_size = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_size, config.norm_eps)
            self.k_norm = RMSNorm(config.head_size, config.norm_eps)
        self.qk_norm = config.qk_norm
        self.core = CausalAttention()
        self.rotate: Rotate = rotate

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D).

        cos, sin: of the tokens' positions, see `RotaryTables`.
        mask: for the core; None: causal, or everything for a lone new token.
        """
        # Heads are counted from the projections' own widths, so that a shard of them works the same.
        q, k, v = (p(x_BTD).unflatten(-1, (-1, self.head_size)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.o_proj(self.core(q, k, v, mask).flatten(-2))
