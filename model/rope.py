"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its scalings, in Llama's rotate-half convention.

B batch, T sequence, H heads, h head size.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.config import LinearScaling, Llama3Scaling, ModelConfig, YarnScaling

# (x, cos, sin) -> x rotated, see `rotate`.
Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
PIECE_ELEMENTS = 1 << 18


class RotaryTables(nn.Module):
    """cos and sin of the rotation angles, in fp32 whatever the model's precision.

    Only the frequencies are kept, a tensor a device, outside the module's state: made on first use, so that a model
    built on the meta device, cast to bf16 or partitioned by ZeRO has them right without doing anything.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._frequencies: dict[torch.device, Tensor] = {}

    def forward(self, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """positions (B, T), or (T,) for all rows alike -> cos, sin (B or 1, T, 1, h/2) fp32."""
        device = positions_BT.device
        if device not in self._frequencies:
            self._frequencies[device] = inverse_frequencies(self.config).to(device)
        positions_BT = positions_BT if positions_BT.dim() == 2 else positions_BT[None]
        angles = positions_BT[..., None, None].float() * self._frequencies[device]
        factor = attention_factor(self.config)
        return angles.cos() * factor, angles.sin() * factor


def rotate(x_BTHh: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + h/2]) by its position's angle; computed in fp32, returned in x's dtype."""
    return _Rotation.apply(x_BTHh, cos, sin, x_BTHh.numel())


def rotate_in_pieces(x_BTHh: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rotate`, a few sequences at a time: for processors, in whose cache their fp32 copies stay. Compiled, the
    whole makes no copies."""
    if torch.compiler.is_compiling():
        return rotate(x_BTHh, cos, sin)
    return _Rotation.apply(x_BTHh, cos, sin, PIECE_ELEMENTS)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: nothing of x is kept, and both ways cost the same."""

    @staticmethod
    def forward(ctx: Any, x_BTHh: Tensor, cos: Tensor, sin: Tensor, piece_elements: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.piece_elements = piece_elements
        return _rotated(x_BTHh, cos, sin, piece_elements)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHh: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad_BTHh, cos, -sin, ctx.piece_elements), None, None, None


def _rotated(x_BTHh: Tensor, cos: Tensor, sin: Tensor, piece_elements: int) -> Tensor:
    """b: the sequences of a piece."""
    B, half = len(x_BTHh), x_BTHh.size(-1) // 2
    rotated_BTHh = torch.empty_like(x_BTHh)
    rows = max(1, piece_elements * B // max(1, x_BTHh.numel()))
    both_cos = torch.cat((cos, cos), dim=-1)
    for piece in (slice(start, start + rows) for start in range(0, B, rows)):
        own_cos, own_sin = (both_cos, sin) if len(sin) == 1 else (both_cos[piece], sin[piece])
        x_bTHh = x_BTHh[piece].to(torch.promote_types(x_BTHh.dtype, torch.float32))
        first, second = x_bTHh.chunk(2, dim=-1)
        turned_bTHh = x_bTHh * own_cos
        turned_bTHh[..., :half].addcmul_(second, own_sin, value=-1)
        turned_bTHh[..., half:].addcmul_(first, own_sin)
        rotated_BTHh[piece] = turned_bTHh
    return rotated_BTHh


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians a position for each pair of dimensions, (h/2,) fp32 on the CPU, with the config's scaling applied."""
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32, device="cpu") / config.head_size
    plain = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return plain
    return _SCALINGS[config.rope_scaling.type](plain, config)


def attention_factor(config: ModelConfig) -> float:
    """What cos and sin are multiplied by: 1, but for YaRN 0.1 ln(factor) + 1 (its section 3.4) or the config's own."""
    scaling = config.rope_scaling
    if not isinstance(scaling, YarnScaling):
        return 1.0
    return scaling.attention_factor if scaling.attention_factor is not None else 0.1 * math.log(scaling.factor) + 1.0


def _linear(plain: Tensor, config: ModelConfig) -> Tensor:
    assert isinstance(config.rope_scaling, LinearScaling)
    return plain / config.rope_scaling.factor


def _llama3(plain: Tensor, config: ModelConfig) -> Tensor:
    """Llama 3.1: blend by how many turns a pair makes over the original context."""
    scaling = config.rope_scaling
    assert isinstance(scaling, Llama3Scaling)
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor


def _yarn(plain: Tensor, config: ModelConfig) -> Tensor:
    """YaRN's NTK-by-parts (its section 3.2): the ramp runs over dimensions, between those that make beta_fast and
    beta_slow turns in the original context, rounded outwards."""
    scaling = config.rope_scaling
    assert isinstance(scaling, YarnScaling)

    def dimension_of(turns: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return config.head_size * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), config.head_size - 1)
    dimensions = torch.arange(len(plain), dtype=torch.float32, device=plain.device)
    interpolated = ((dimensions - low) / max(high - low, 0.001)).clamp(0, 1)
    return interpolated * plain / scaling.factor + (1 - interpolated) * plain


_SCALINGS: dict[str, Callable[[Tensor, ModelConfig], Tensor]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
