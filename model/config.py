"""The architecture of a decoder, and nothing else: no torch here, so that planning and `--help` stay quick."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

VOCAB_MULTIPLE = 128
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

    @model_validator(mode="before")
    @classmethod
    def _merge_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        preset = given.get("preset")
        fields = {key: value for key, value in given.items() if key != "preset"}
        merged = {**({} if preset is None else _preset(preset)), **fields}
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


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding and head weights: the next multiple of 128, whatever the layout."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _preset(name: Any) -> Mapping[str, Any]:
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(str(name), PRESETS, n=1, cutoff=0.0)
    raise ValueError(f"unknown model preset {name!r}; did you mean {near[0]!r}? Presets: {', '.join(PRESETS)}")


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
}
