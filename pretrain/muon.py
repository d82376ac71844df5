"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for matrices with AdamW for the rest.

Muon's momentum is elementwise, so it lives as its parameter does, whole or as a rank's flat share, and is checkpointed
like AdamW's moments. Only orthogonalising needs whole matrices. It is behind `Muon.orthogonalizer`, and
`pretrain/muon_sharded.py` does it for matrices that lie in pieces on many ranks.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Each singular value x becomes a x + b x^3 + c x^5: as steep as can be at 0, and roughly 1 after five times.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
SMALLEST_NORM = 1e-7


class Direction(NamedTuple):
    """How a part of a parameter moves: `target -= lr * scale * update`. Both tensors have the same shape."""

    target: Tensor
    update: Tensor
    scale: float


# (parameters of a group, their momentum updates) -> what becomes of every element of the parameters.
Orthogonalizer = Callable[[Sequence[Tensor], Sequence[Tensor]], Iterable[Direction]]


def newton_schulz(matrices: Tensor) -> Tensor:
    """Matrices (..., m, n) with every singular value moved near 1 (between 0.68 and 1.16), in the dtype they come in.

    The smallest grow most, by up to 3.4445 ** 5 = 485, and the rounding errors along their directions with them. In
    fp32 that does not show on a weight: inputs that differ by 1e-6 of their size give updates that differ by 1e-5 of
    theirs, by 2e-4 where most singular values are 0. In bf16 it does: gradients of two layouts differ by some 1e-2,
    their updates then by 5e-2 to 1e-1, and where singular values are 0 the directions that noise takes are free.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.reshape(-1, *matrices.shape[-2:])
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


def update_scale(shape: Sequence[int]) -> float:
    """What gives the update of a matrix (..., m, n) the size of AdamW's: a root mean square of 0.2.

    So AdamW's learning rate and weight decay carry over (Moonlight, Liu et al. 2025, arXiv 2502.16982, section 2.2).
    """
    return 0.2 * math.sqrt(max(shape[-2:]))


def whole_matrices(parameters: Sequence[Tensor], updates: Sequence[Tensor]) -> Iterator[Direction]:
    """The orthogonalizer of parameters that are whole: each a matrix, or a stack of them, such as (E, m, n) experts."""
    for parameter, update in zip(parameters, updates, strict=True):
        yield Direction(parameter, newton_schulz(update), update_scale(parameter.shape))


class Muon(torch.optim.AdamW):
    """AdamW (fused) whose groups with `algorithm="muon"` and a `momentum` are updated by Muon instead.

    Nesterov momentum and decoupled weight decay; state of a parameter of such a group: `step`, `momentum_buffer`.
    Orthogonalising is done in `dtype`. Groups are looked up at each step: DeepSpeed replaces their parameters by flat
    ones after construction, and steps one group at a time.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, **adamw: Any) -> None:
        super().__init__(groups, fused=True, **adamw)
        self.dtype = dtype
        self.orthogonalizer: Orthogonalizer = whole_matrices

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every group. Each parameter of a Muon group needs a gradient, as its matrices are shared."""
        groups = self.param_groups
        for group in groups:
            if group["algorithm"] == "muon":
                self._muon_step(group)
        self.param_groups = [group for group in groups if group["algorithm"] == "adamw"]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _muon_step(self, group: dict[str, Any]) -> None:
        parameters, lr = group["params"], group["lr"]
        updates = [self._momentum_update(parameter, group["momentum"]) for parameter in parameters]
        for parameter in parameters:
            parameter.mul_(1 - lr * group["weight_decay"])
        for direction in self.orthogonalizer(parameters, updates):
            direction.target.add_(direction.update, alpha=-lr * direction.scale)

    def _momentum_update(self, parameter: Tensor, momentum: float) -> Tensor:
        """The gradient carried on by Nesterov momentum, in the dtype of orthogonalising, which normalises it."""
        assert parameter.grad is not None, "without a gradient on this rank, others would wait for its part"
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += 1
        state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum_buffer"], momentum).to(self.dtype)
