"""Which part of each parameter a rank holds under tensor and expert parallelism. Pure arithmetic, no torch.

Tensor parallelism is Megatron's (Shoeybi et al. 2019, arXiv 1909.08053, section 3; Korthikanti et al. 2022, arXiv
2205.05198, section 4.2.2): the matrices into a block's inside are split by output features ("column parallel"), those
out of it by input features ("row parallel"), embedding and head by vocabulary. Between them the tensor-parallel ranks
split the sequence, so what acts there (norms, router, experts) is on each rank and sees other tokens on each. Experts
are split by expert parallelism alone, whole experts on each rank.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

from model.parameters import is_expert, keeps_fp32
from pretrain.boxes import Box, Index
from pretrain.config import RunConfig
from pretrain.layout import Axis, Layout

# The dimension of the weight (out features, in features) that is split; None: not split.
TENSOR_PLAN: dict[str, int | None] = {
    "embed_tokens.weight": 0,
    "lm_head.weight": 0,
    "q_proj.weight": 0,
    "k_proj.weight": 0,
    "v_proj.weight": 0,
    "o_proj.weight": 1,
    "gate_proj.weight": 0,
    "up_proj.weight": 0,
    "down_proj.weight": 1,
    "norm.weight": None,
    "q_norm.weight": None,
    "k_norm.weight": None,
    "input_layernorm.weight": None,
    "post_attention_layernorm.weight": None,
    "router.weight": None,
    "router.bias": None,
    "experts.gate_proj": None,
    "experts.up_proj": None,
    "experts.down_proj": None,
}
KEY_VALUE = ("k_proj.weight", "v_proj.weight")


@dataclass(frozen=True)
class Placement:
    """Where a parameter of logical `shape` lies: this rank holds `box` of it.

    copies: the axis of ranks that hold the same box and see different tokens of the same sequences, or other heads, so
        that the gradient is the sum of theirs; None if there are none. Of them the first writes checkpoints.
    replicas: the axis of ranks that hold the same box and see other data: ZeRO and the averaging of gradients go over
        these.
    """

    shape: Index
    box: Box
    copies: Axis | None
    replicas: Axis


def placement(name: str, shape: Index, layout: Layout, rank: int) -> Placement:
    """The placement of a parameter (or buffer) by its logical name and shape.

    Raises AssertionError for a name without a plan: what tensor parallelism does not know it must not replicate.
    """
    whole = Box((0,) * len(shape), shape)
    if is_expert(name) and layout.expert > 1:
        index = layout.group_of(rank, "expert").index(rank)
        return Placement(shape, _share(shape, 0, layout.expert, index), None, "expert_data")
    if layout.tensor == 1:
        return Placement(shape, whole, None, "token")
    key = ".".join(name.split(".")[-2:])
    assert key in TENSOR_PLAN, f"tensor parallelism has no plan for {name}: add it to TENSOR_PLAN"
    dimension = TENSOR_PLAN[key]
    if dimension is None:
        return Placement(shape, whole, "tensor", "token")
    copies = layout.kv_copies if key in KEY_VALUE else 1
    index = layout.group_of(rank, "tensor").index(rank) // copies
    box = _share(shape, dimension, layout.tensor // copies, index)
    return Placement(shape, box, "kv_head" if copies > 1 else None, "token")


def holders(name: str, shape: Index, layout: Layout) -> list[list[int]]:
    """All ranks, in groups of those that hold the same box of a parameter (or buffer).

    Tensor- and expert-parallel ranks are consecutive: which box a rank holds repeats after the least common multiple of
    their numbers.
    """
    period = math.lcm(layout.tensor, layout.expert)
    ranks_of: dict[Box, list[int]] = defaultdict(list)
    for first in range(period):
        ranks_of[placement(name, shape, layout, first).box] += range(first, layout.world, period)
    return [sorted(ranks) for ranks in ranks_of.values()]


def kept_beside_zero(name: str, config: RunConfig) -> bool:
    """Whether each rank holds a parameter whole at ZeRO 3, which keeps all parameters in one dtype: a router's weight,
    in fp32 beside a model that is not."""
    return keeps_fp32(name) and config.parallel.zero_stage == 3 and config.precision != "fp32"


def _share(shape: Index, dimension: int, parts: int, index: int) -> Box:
    """The `index`-th of `parts` equal parts along a dimension."""
    size, offset = list(shape), [0] * len(shape)
    assert size[dimension] % parts == 0, f"{shape} does not split into {parts} along dimension {dimension}"
    size[dimension] //= parts
    offset[dimension] = index * size[dimension]
    return Box(tuple(offset), tuple(size))
