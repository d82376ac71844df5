"""RMSNorm, and its computation for processors, on which torch has no kernel of its own for it.

N tokens (or heads of them), R of a piece, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

# (x, weight, eps) -> x normalised, in its own dtype.
Norm = Callable[[Tensor, Tensor, float], Tensor]
# Elements that are worked on at a time: a few fp32 tensors of so many stay in a processor's cache.
PIECE_ELEMENTS = 1 << 18


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4), in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.function: Norm = rms_norm

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return self.function(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """torch's: one kernel on a GPU, elsewhere half a dozen operations on fp32 copies, two of which backward keeps."""
    return functional.rms_norm(x, weight_D.shape, weight_D, eps)


def rms_norm_in_pieces(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Some rows at a time. For backward it keeps x, and a number a row. Compiled, it is torch's, then one kernel."""
    if torch.compiler.is_compiling():
        return rms_norm(x, weight_D, eps)
    return _RMSNorm.apply(x, weight_D, eps)


class _RMSNorm(torch.autograd.Function):
    """y = n w with n = x r, r = (mean(x^2) + eps)^-1/2; so dw = sum over rows of dy n, and, since r depends on x,
    dx = r (dy w - n mean(dy w n))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_ND = x.reshape(-1, len(weight_D))
        accurate = torch.promote_types(x.dtype, torch.float32)
        weight = weight_D.to(accurate)
        y_ND, inverse_N1 = torch.empty_like(x_ND), x_ND.new_empty(len(x_ND), 1, dtype=accurate)
        normed_buffer, squares_buffer = x_ND.new_empty((2, _rows(x_ND), x_ND.size(1)), dtype=accurate)
        for start in range(0, len(x_ND), _rows(x_ND)):
            piece = slice(start, min(start + _rows(x_ND), len(x_ND)))
            normed_RD = normed_buffer[: piece.stop - start].copy_(x_ND[piece])
            squares_RD = torch.mul(normed_RD, normed_RD, out=squares_buffer[: piece.stop - start])
            inverse_N1[piece] = squares_RD.mean(dim=1, keepdim=True).add_(eps).rsqrt_()
            y_ND[piece] = normed_RD.mul_(inverse_N1[piece]).mul_(weight)
        ctx.save_for_backward(x, weight_D, inverse_N1)
        return y_ND.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, inverse_N1 = ctx.saved_tensors
        D = len(weight_D)
        x_ND, grad_ND = x.reshape(-1, D), grad.reshape(-1, D)
        weight = weight_D.to(inverse_N1.dtype)
        grad_x_ND, grad_weight = torch.empty_like(x_ND), torch.zeros_like(weight)
        buffers = x_ND.new_empty((3, _rows(x_ND), D), dtype=inverse_N1.dtype)
        for start in range(0, len(x_ND), _rows(x_ND)):
            piece = slice(start, min(start + _rows(x_ND), len(x_ND)))
            normed_RD, inner_RD, product_RD = buffers[:, : piece.stop - start]
            normed_RD.copy_(x_ND[piece]).mul_(inverse_N1[piece])
            torch.mul(inner_RD.copy_(grad_ND[piece]), normed_RD, out=product_RD)
            grad_weight += product_RD.sum(dim=0)
            mean_R1 = torch.mv(product_RD, weight)[:, None] / D
            inner_RD.mul_(weight).addcmul_(normed_RD, mean_R1, value=-1)
            grad_x_ND[piece] = inner_RD.mul_(inverse_N1[piece])
        return grad_x_ND.view_as(x), grad_weight.to(weight_D.dtype), None


def _rows(x_ND: Tensor) -> int:
    """Rows of a piece."""
    return max(1, min(len(x_ND), PIECE_ELEMENTS // x_ND.size(1)))
