"""Which token comes next: the most probable one, or one drawn from a distribution that options have cut down.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.generation.options import GenerationOptions


def next_tokens(logits_BV: Tensor, options: GenerationOptions, uniform_B: Sequence[float]) -> list[int]:
    """A token of each row. uniform_B: a number in [0, 1) a row, which decides the row's draw.

    A draw is the inverse of the cumulative distribution at that number, so the device takes no part in chance.
    """
    if options.temperature == 0:
        return logits_BV.argmax(dim=-1).tolist()
    probabilities_BV = filtered(logits_BV, options).double().softmax(dim=-1)
    cumulative_BV = probabilities_BV.cumsum(dim=-1)
    # Scaled, since the last sum is 1 only up to rounding. In doubles u * x < x holds for each such u, so there is
    # always a token, and the first whose sum is above the point has a probability above 0.
    point_B1 = torch.tensor(uniform_B, dtype=torch.float64, device=logits_BV.device)[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, point_B1, right=True)[:, 0].tolist()


def filtered(logits_BV: Tensor, options: GenerationOptions) -> Tensor:
    """Logits divided by the temperature (above 0), with -inf for tokens that top_k, and then top_p, leave out.

    Tokens as probable as the last of top_k are kept with it.
    """
    logits_BV = logits_BV / options.temperature
    if options.top_k is not None and options.top_k < logits_BV.size(-1):
        least_B1 = logits_BV.topk(options.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if options.top_p is not None and options.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1)
        # Summed from the least probable: what stays within 1 - top_p is the tail that goes; the best always stays.
        tail_BV = sorted_BV.softmax(dim=-1).cumsum(dim=-1) <= 1 - options.top_p
        tail_BV[:, -1] = False
        logits_BV = logits_BV.masked_fill(torch.empty_like(tail_BV).scatter_(-1, order_BV, tail_BV), -torch.inf)
    return logits_BV
