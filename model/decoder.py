"""A pre-norm causal decoder (Llama's architecture; Touvron et al. 2023, arXiv 2302.13971, section 2.2).

B batch, T sequence, D model width, V vocabulary. Parameters carry Llama's names without the leading `model.`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.attention import Attention, Mask, causal_document_mask
from model.config import ModelConfig, has_experts, padded_vocab_size
from model.kv_cache import KVCache, LayerCache
from model.loss import (
    IGNORED_TARGET,
    WHOLE,
    LossSums,
    SoftmaxLoss,
    linear_cross_entropy,
    linear_cross_entropy_tokens,
    softmax_loss,
)
from model.mlp import MLP
from model.moe import MoE
from model.norm import RMSNorm
from model.rope import RotaryTables


class Block(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x)), where `mlp` may be a mixture of experts."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.has_experts = has_experts(config, layer)
        self.mlp: nn.Module = MoE(config) if self.has_experts else MLP(config.hidden_size, config.ffn_size)

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> (B, T, D), and the losses of the router (scalar fp32, 0 without one); the rest as
        `Attention.forward`."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin, mask, cache)
        normed_BTD = self.post_attention_layernorm(x_BTD)
        if self.has_experts:
            y_BTD, auxiliary = self.mlp(normed_BTD)
        else:
            y_BTD, auxiliary = self.mlp(normed_BTD), x_BTD.new_zeros((), dtype=torch.float32)
        return x_BTD + y_BTD, auxiliary


class Head(nn.Module):
    """The map from final hidden states to logits, with its loss; holds a weight unless it is tied.

    The loss is this module's forward, and its weight is used nowhere else, so that whatever gathers or shards a
    module's parameters around its forward (ZeRO 3, tensor parallelism) finds them here.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.part = WHOLE  # of the vocabulary, that the weight holds
        self.softmax: SoftmaxLoss = softmax_loss
        shape = (padded_vocab_size(config.vocab_size), config.hidden_size)
        self.register_parameter("weight", None if config.tie_embeddings else nn.Parameter(torch.empty(shape)))

    def forward(
        self, hidden_BTD: Tensor, targets_BT: Tensor, z_loss: float = 0.0, tied_weight: Tensor | None = None
    ) -> LossSums:
        """Sums of the losses of the valid targets, see `linear_cross_entropy`."""
        weight = self._weight(tied_weight)
        return linear_cross_entropy(
            hidden_BTD.flatten(0, 1),
            weight,
            targets_BT.flatten(),
            self.vocab_size,
            z_loss,
            part=self.part,
            softmax=self.softmax,
        )

    def token_losses(
        self, hidden_BTD: Tensor, targets_BT: Tensor, counted_N: Tensor, tied_weight: Tensor | None = None
    ) -> Tensor:
        """Negative log-likelihood of each target, (B, T) fp32, 0 but at the `counted_N`: their places in B x T."""
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1)[counted_N], targets_BT.flatten()[counted_N]
        nll_N = linear_cross_entropy_tokens(
            hidden_ND, self._weight(tied_weight), targets_N, self.vocab_size, softmax=self.softmax
        )
        return nll_N.new_zeros(targets_BT.numel()).index_copy_(0, counted_N, nll_N).view_as(targets_BT)

    def logits(self, hidden: Tensor, tied_weight: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., V) fp32, without the padding."""
        return functional.linear(hidden, self._weight(tied_weight)[: self.vocab_size]).float()

    def _weight(self, tied_weight: Tensor | None) -> Tensor:
        weight = self.weight if tied_weight is None else tied_weight
        assert isinstance(weight, Tensor), "a tied head needs the embedding's weight"
        return weight


class Decoder(nn.Module):
    """Tokens to losses, hidden states or logits. Build it under `torch.device("meta")` or not; see `model.init`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(padded_vocab_size(config.vocab_size), config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Head(config)
        self.rotary = RotaryTables(config)
        self.document_mask: Callable[[Tensor], Mask] = causal_document_mask  # goes with the layers' `self_attn.core`

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        z_loss: float = 0.0,
    ) -> LossSums:
        """The objective of training and validation: sums over the valid targets (-100 does not count), not means; and,
        in training mode, the routers' losses summed over layers and sequences.

        positions_BT: default 0 .. T-1. document_ids_BT: used if the config has `document_mask`.
        """
        hidden_BTD, auxiliary = self._hidden(tokens_BT, positions_BT, document_ids_BT)
        return self.lm_head(hidden_BTD, targets_BT, z_loss, self._tied_weight())._replace(auxiliary=auxiliary)

    def hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, (B, T, D).

        cache: holds the tokens before these and knows the positions of these; it grows by T.
        """
        return self._hidden(tokens_BT, positions_BT, document_ids_BT, cache)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V) fp32, without the vocabulary's padding."""
        return self.lm_head.logits(hidden, self._tied_weight())

    def token_losses(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Negative log-likelihood (nats) of each target, (B, T) fp32, 0 where it is -100; without gradient."""
        with torch.no_grad():
            # Only these need logits. Looked up first: on a GPU it waits, and later it would for all of the layers.
            counted_N = (targets_BT.flatten() != IGNORED_TARGET).nonzero()[:, 0]
            hidden_BTD = self.hidden(tokens_BT, positions_BT, document_ids_BT)
            return self.lm_head.token_losses(hidden_BTD, targets_BT, counted_N, self._tied_weight())

    def _hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None,
        document_ids_BT: Tensor | None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `hidden`, with the sum of the layers' auxiliary losses."""
        T = tokens_BT.size(1)
        mask: Mask | None
        if cache is not None:
            assert positions_BT is document_ids_BT is None, "a cache continues one document a row"
            positions_BT, mask = cache.positions(T), cache.mask(T)
        else:
            positions_BT = torch.arange(T, device=tokens_BT.device) if positions_BT is None else positions_BT
            mask = self._mask(document_ids_BT)
        cos, sin = self.rotary(positions_BT)
        x_BTD = self.embed_tokens(tokens_BT)
        auxiliary = x_BTD.new_zeros((), dtype=torch.float32)
        for index, block in enumerate(self.layers):
            x_BTD, of_block = block(x_BTD, cos, sin, mask, None if cache is None else cache.layers[index])
            auxiliary = auxiliary + of_block
        return self.norm(x_BTD), auxiliary

    def _tied_weight(self) -> Tensor | None:
        return self.embed_tokens.weight if self.config.tie_embeddings else None

    def _mask(self, document_ids_BT: Tensor | None) -> Mask | None:
        """None where plain causal attention says it all."""
        if not self.config.document_mask or document_ids_BT is None:
            return None
        return self.document_mask(document_ids_BT)
