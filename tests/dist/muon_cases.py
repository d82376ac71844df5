"""Cases for test_muon.py: matrices cut up as layouts do, orthogonalised together, held against the whole ones."""

import math

import torch
import torch.distributed as dist
from torch import nn

from pretrain.boxes import Box, Index, boxes_of_range, slices
from pretrain.device import detect
from pretrain.muon import Muon, newton_schulz, update_scale
from pretrain.muon_sharded import HeldBox, ShardedOrthogonalizer

DEVICE, RANK, WORLD = detect(), dist.get_rank(), dist.get_world_size()
PADDING = 5
SHAPES: dict[str, Index] = {"q": (16, 12), "k": (4, 12), "o": (12, 16), "up": (28, 12), "experts": (4, 8, 12)}
WHOLE = {name: Box((0,) * len(shape), shape) for name, shape in SHAPES.items()}


def random_values(seed: int) -> dict[str, torch.Tensor]:
    """Whole parameters, the same on every rank."""
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random).to(DEVICE) for name, shape in SHAPES.items()}


def share(name: str, dimension: int, parts: int, index: int) -> Box:
    """One of equal parts of a parameter along a dimension."""
    shape = SHAPES[name]
    size = tuple(n // parts if d == dimension else n for d, n in enumerate(shape))
    return Box(tuple(index * n if d == dimension else 0 for d, n in enumerate(size)), size)


def flat_share(boxes: dict[str, Box], ranks: int, rank: int) -> tuple[list[HeldBox], int]:
    """ZeRO: this rank's shards laid end to end and padded, and of that one of `ranks` equal ranges, with its size."""
    total = sum(box.numel for box in boxes.values()) + PADDING
    size = -(-total // ranks)
    low, begin, fragments = rank * size, 0, []
    for name, shard in boxes.items():
        end, at = begin + shard.numel, max(begin, low) - low
        for part in boxes_of_range(shard.size, max(begin, low) - begin, min(end, low + size) - begin):
            box = Box(tuple(map(sum, zip(part.offset, shard.offset, strict=True))), part.size)
            fragments.append(HeldBox(name, SHAPES[name], box, at))
            at += box.numel
        begin = end
    return fragments, size


def filled(fragments: list[HeldBox], size: int, whole: dict[str, torch.Tensor]) -> torch.Tensor:
    """A rank's flat tensor of whole values; NaN in the padding, which must not reach a matrix."""
    flat = torch.full((size,), math.nan, device=DEVICE)
    for fragment in fragments:
        values = whole[fragment.name][slices(fragment.box, WHOLE[fragment.name])]
        flat[fragment.start : fragment.start + fragment.box.numel] = values.reshape(-1)
    return flat


def zero() -> list[tuple[list[HeldBox], int]]:
    """One flat share of everything."""
    return [flat_share(WHOLE, WORLD, RANK)]


def copies() -> list[tuple[list[HeldBox], int]]:
    """Everything on every rank, a tensor each."""
    return [flat_share({name: box}, 1, 0) for name, box in WHOLE.items()]


def crowded() -> list[tuple[list[HeldBox], int]]:
    """So little that the last ranks' shares are padding alone."""
    return [flat_share({"k": WHOLE["k"]}, 1, 0) if RANK == 0 else ([], 53)]


def tensor_parallel() -> list[tuple[list[HeldBox], int]]:
    """Two tensor-parallel ranks side by side with one key and value head in common, and ZeRO over the rest."""
    data, tensor = divmod(RANK, 2)
    rows = {name: share(name, 0, 2, tensor) for name in ("q", "up")}
    boxes = {**rows, "o": share("o", 1, 2, tensor), "k": WHOLE["k"], "experts": WHOLE["experts"]}
    return [flat_share(boxes, WORLD // 2, data)]


def expert_parallel() -> list[tuple[list[HeldBox], int]]:
    """Dense matrices as under ZeRO; of the experts half on each of two ranks, in a group of its own."""
    data, expert = divmod(RANK, 2)
    dense = {name: box for name, box in WHOLE.items() if name != "experts"}
    return [
        flat_share(dense, WORLD, RANK),
        flat_share({"experts": share("experts", 0, 2, expert)}, WORLD // 2, data),
    ]


LAYOUTS = {"zero": zero, "copies": copies, "crowded": crowded, "tensor": tensor_parallel, "expert": expert_parallel}


def error(layout: str, dtype: torch.dtype) -> float:
    """The largest difference, on any rank, of a cut-up update from the whole matrices'."""
    whole = random_values(0)
    expected = {
        name: newton_schulz(value.to(dtype)).float() * update_scale(value.shape) for name, value in whole.items()
    }
    layouts = LAYOUTS[layout]()
    tensors = [torch.zeros(size, device=DEVICE) for _, size in layouts]
    held = {tensor: fragments for tensor, (fragments, _) in zip(tensors, layouts, strict=True) if fragments}
    orthogonalizer = ShardedOrthogonalizer(held, dist.group.WORLD)
    updates = [filled(fragments, size, whole).to(dtype) for fragments, size in layouts]
    for move in orthogonalizer(tensors, updates):
        move.target.add_(move.update, alpha=move.scale)
    differences = [torch.zeros((), device=DEVICE)]
    for tensor, (fragments, size) in zip(tensors, layouts, strict=True):
        wanted = filled(fragments, size, expected).nan_to_num(0.0)
        differences.append((tensor - wanted).abs().max())
    worst = torch.stack(differences).max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def training_error(layout: str) -> float:
    """Several steps of the optimizer, a group for each tensor, against an optimizer of whole matrices; in fp32."""

    def group(parameter: torch.Tensor) -> dict[str, object]:
        return {"params": [parameter], "algorithm": "muon", "momentum": 0.95, "weight_decay": 0.1}

    whole = {name: nn.Parameter(value) for name, value in random_values(1).items()}
    layouts = LAYOUTS[layout]()
    tensors = [nn.Parameter(filled(*each, {n: p.detach() for n, p in whole.items()})) for each in layouts]
    oracle = Muon([group(parameter) for parameter in whole.values()], torch.float32, lr=1e-2)
    sharded = Muon([group(tensor) for tensor in tensors], torch.float32, lr=1e-2)
    held = {tensor: fragments for tensor, (fragments, _) in zip(tensors, layouts, strict=True) if fragments}
    sharded.orthogonalizer = ShardedOrthogonalizer(held, dist.group.WORLD)
    for step in range(3):
        gradients = random_values(2 + step)
        for name, parameter in whole.items():
            parameter.grad = gradients[name]
        for tensor, each in zip(tensors, layouts, strict=True):
            tensor.grad = filled(*each, gradients)
        oracle.step()
        sharded.step()
    worst = torch.zeros((), device=DEVICE)
    for tensor, each in zip(tensors, layouts, strict=True):
        wanted = filled(*each, {name: parameter.detach() for name, parameter in whole.items()})
        worst = torch.maximum(worst, (tensor.detach() - wanted).nan_to_num(0.0).abs().max())
        assert torch.equal(tensor.isnan(), wanted.isnan()), "padding is padding still, and nothing else is"
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


CASES = {
    **{f"fp32 {name}": lambda name=name: error(name, torch.float32) for name in LAYOUTS},
    **{f"bf16 {name}": lambda name=name: error(name, torch.bfloat16) for name in LAYOUTS},
    **{f"train {name}": lambda name=name: training_error(name) for name in LAYOUTS},
}
