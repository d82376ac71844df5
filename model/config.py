"""The architecture of a decoder, and nothing else: no torch here, so that planning and `--help` stay quick."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from model.presets import PRESETS

VOCAB_MULTIPLE = 128
GROUPED_MULTIPLE = 8  # widths of a grouped matrix product: rows of 16 bytes in bf16
_FROM_THE_REST: Any = None


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LinearScaling(_Frozen):
    """Position interpolation: every frequency divided by `factor` (Chen et al. 2023, arXiv 2306.15595, section 2.3)."""

    type: Literal["linear"]
    factor: float = Field(ge=1)


class Llama3Scaling(_Frozen):
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a linear blend between."""

    type: Literal["llama3"]
    factor: float = Field(ge=1)
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> "Llama3Scaling":
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor:g} must be below high_freq_factor {self.high_freq_factor:g}; "
                "Llama 3.1 uses 1 and 4"
            )
        return self


class YarnScaling(_Frozen):
    """YaRN (Peng et al. 2023, arXiv 2309.00071): NTK-by-parts, and `attention_factor` on cos and sin.

    attention_factor: None means the paper's 0.1 ln(factor) + 1 (equation 22, its square root there applied to q and k).
    """

    type: Literal["yarn"]
    factor: float = Field(ge=1)
    original_max_position_embeddings: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    attention_factor: PositiveFloat | None = None

    @model_validator(mode="after")
    def _ordered(self) -> "YarnScaling":
        if self.beta_slow >= self.beta_fast:
            raise ValueError(
                f"beta_slow {self.beta_slow:g} must be below beta_fast {self.beta_fast:g}; the paper uses 1 and 32"
            )
        return self


RopeScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="type")]


class MoEConfig(_Frozen):
    """Mixture of experts in place of the MLP: a token goes to the `experts_per_token` experts its router scores best.

    experts, experts_per_token, expert_ffn_size: how many there are, how many a token takes, inner width of each.
    shared_experts: experts that every token takes besides (DeepSeek-MoE, Dai et al. 2024, arXiv 2401.06066); they are
        one MLP of `shared_experts * expert_ffn_size`.
    first_layer, layer_frequency: layers first_layer, first_layer + layer_frequency, ... have experts, the rest an MLP.
    router: score of an expert from its logit: softmax over the experts (Mixtral, Qwen3) or sigmoid (DeepSeek-V3).
    normalize_weights: the weights of a token's experts are divided by their sum.
    routed_scaling_factor: what those weights are multiplied by in the end.
    groups, groups_per_token: experts are in so many groups, and a token's come from its best groups only, a group's
        score being the sum of its two best (DeepSeek-V3, arXiv 2412.19437, section 2.1.2); 1 and 1: no such limit.
    balance: `aux_loss`, a loss per sequence (Switch Transformer, arXiv 2101.03961, equations 4 to 6) weighed by
        `balance_coefficient`; `bias`, a bias on the scores for the choice alone, moved after each step by
        `bias_update_rate` towards the experts with less load (DeepSeek-V3, section 2.1.2); or `none`.
    z_loss: coefficient of the mean squared log-partition of the router (ST-MoE, arXiv 2202.08906, equation 5).
    """

    experts: PositiveInt
    experts_per_token: PositiveInt
    expert_ffn_size: PositiveInt
    shared_experts: int = Field(default=0, ge=0)
    first_layer: int = Field(default=0, ge=0)
    layer_frequency: PositiveInt = 1
    router: Literal["softmax", "sigmoid"] = "softmax"
    normalize_weights: bool = True
    routed_scaling_factor: PositiveFloat = 1.0
    groups: PositiveInt = 1
    groups_per_token: PositiveInt = 1
    balance: Literal["aux_loss", "bias", "none"] = "aux_loss"
    balance_coefficient: float = Field(default=0.01, ge=0)
    bias_update_rate: float = Field(default=0.001, ge=0)
    z_loss: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _choosable(self) -> "MoEConfig":
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} is more than experts {self.experts}: "
                "choose at most as many as there are"
            )
        if self.experts % self.groups:
            raise ValueError(f"groups {self.groups} does not divide experts {self.experts}: choose a divisor")
        if self.groups_per_token > self.groups:
            raise ValueError(
                f"groups_per_token {self.groups_per_token} is more than groups {self.groups}: "
                "choose at most as many as there are"
            )
        choice = self.groups_per_token * (self.experts // self.groups)
        if self.experts_per_token > choice:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} is more than the {choice} experts of a token's "
                f"groups_per_token {self.groups_per_token}: raise groups_per_token, or lower groups"
            )
        return self

    @model_validator(mode="after")
    def _learnable(self) -> "MoEConfig":
        if self.experts_per_token == 1 and self.normalize_weights:
            raise ValueError(
                "experts_per_token 1 with normalize_weights makes every weight 1, from which no router learns: "
                "set normalize_weights to false"
            )
        if self.expert_ffn_size % GROUPED_MULTIPLE:
            raise ValueError(
                f"expert_ffn_size {self.expert_ffn_size} is not a multiple of {GROUPED_MULTIPLE}, which the experts' "
                "grouped matrix product needs in bf16: choose a multiple"
            )
        return self


class ModelConfig(_Frozen):
    """A pre-norm causal decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU, no bias.

    Given `preset: NAME`, that preset's fields are taken first and the other given fields replace them one by one.
    Every field of a built config is explicit: `num_kv_heads` and `head_size` are filled in where not given.

    hidden_size: model width D.               num_layers: decoder blocks.
    num_heads: query heads H.                 num_kv_heads: key and value heads K, a divisor of H (default H).
    head_size: width of one head (default D / H).
    ffn_size: inner width of SwiGLU.          vocab_size: tokens the tokenizer knows; weights have the padded size.
    rope_theta: base of the rotary wavelengths.
    norm_eps: added to the mean square in RMSNorm.
    tie_embeddings: the head uses the embedding's weight.
    qk_norm: RMSNorm over each query and key head, before RoPE.
    document_mask: tokens attend only within their own document.
    moe: mixture of experts; without it every layer has an MLP.
    """

    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt = _FROM_THE_REST
    head_size: PositiveInt = _FROM_THE_REST
    ffn_size: PositiveInt
    vocab_size: PositiveInt
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: PositiveFloat = 1e-5
    tie_embeddings: bool = False
    qk_norm: bool = False
    document_mask: bool = False
    moe: MoEConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _merge_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        name = given.get("preset")
        preset = {} if name is None else _preset(name)
        fields = {key: value for key, value in given.items() if key != "preset"}
        merged = {**preset, **fields}
        # Mixture of experts is replaced field by field like the model itself; null still takes it away.
        if isinstance(fields.get("moe"), Mapping):
            merged["moe"] = {**preset.get("moe", {}), **fields["moe"]}
        # A derived field given as null is one not given.
        derived = ("num_kv_heads", "head_size")
        return {key: value for key, value in merged.items() if value is not None or key not in derived}

    @model_validator(mode="after")
    def _derive(self) -> "ModelConfig":
        # Past the freeze, once: a built config holds numbers, so that a dumped one says all.
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_size is None:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}; "
                    "choose a multiple, or give head_size"
                )
            object.__setattr__(self, "head_size", self.hidden_size // self.num_heads)
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}: "
                "each key and value head serves an equal group of query heads; choose a divisor"
            )
        if self.head_size % 2:
            raise ValueError(f"head_size {self.head_size} is odd: RoPE rotates pairs; choose an even head_size")
        return self

    @model_validator(mode="after")
    def _has_place_for_experts(self) -> "ModelConfig":
        if self.moe is None:
            return self
        if self.moe.first_layer >= self.num_layers:
            raise ValueError(
                f"moe.first_layer {self.moe.first_layer} leaves no layer with experts, since num_layers is "
                f"{self.num_layers} and layers count from 0: choose a smaller one, or set moe to null"
            )
        if self.hidden_size % GROUPED_MULTIPLE:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of {GROUPED_MULTIPLE}, which the experts' grouped "
                "matrix product needs in bf16: choose a multiple"
            )
        return self


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding and head weights: the next multiple of 128, whatever the layout."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def has_experts(config: ModelConfig, layer: int) -> bool:
    """Whether a layer (counted from 0) has experts rather than an MLP."""
    moe = config.moe
    return moe is not None and layer >= moe.first_layer and (layer - moe.first_layer) % moe.layer_frequency == 0


def _preset(name: Any) -> Mapping[str, Any]:
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(str(name), PRESETS, n=1, cutoff=0.0)
    raise ValueError(f"unknown model preset {name!r}; did you mean {near[0]!r}? Presets: {', '.join(PRESETS)}")
