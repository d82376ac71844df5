"""Whether ranks that are to hold the same values still hold the same bits.

A broken device, or a bug, moves one replica away from the others without a sign: each rank's loss is of its own data
anyway. So each rank hashes what it holds, one number a tensor, on the device; all hashes are gathered at once, and the
hosts compare them.
"""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 2**20  # bounds the memory of hashing: a few times 8 bytes for each
CHUNK_FACTOR = 0x5851F42D4C957F2D  # any odd number: this is Knuth's of the MMIX generator, TAOCP 2, section 3.3.4
BITS = {2: torch.int16, 4: torch.int32}


class Replica(NamedTuple):
    """What this rank holds of a parameter, and which ranks hold the same: groups that each rank names alike."""

    name: str
    groups: Sequence[Sequence[int]]
    values: Sequence[Tensor]


def differing_replicas(replicas: Sequence[Replica], device: torch.device) -> list[tuple[str, list[int]]]:
    """(name, ranks) of what ranks hold that differs from what others hold of the same. Collective: one gathering.

    replicas: the same names, in the same order and with the same groups, on every rank.
    """
    weights_on = functools.cache(odd_weights)
    own = torch.stack([bit_hash(replica.values, weights_on).to(device) for replica in replicas])
    hashes = own
    if dist.is_initialized():
        hashes = own.new_empty(dist.get_world_size() * len(own))
        dist.all_gather_single(hashes, own)
    return odd_ones_out(replicas, hashes.view(-1, len(own)).cpu())


def odd_ones_out(replicas: Sequence[Replica], hashes: Tensor) -> list[tuple[str, list[int]]]:
    """(name, ranks) of those whose hash is not that of most ranks of their group, or of its first where no value has
    the majority. hashes: (ranks, replicas) int64 on the host."""
    wrong: dict[str, set[int]] = defaultdict(set)
    for replica, column in zip(replicas, hashes.T.numpy(), strict=True):
        for group in replica.groups:
            values = column[group]
            if (values != values[0]).any():
                value, count = Counter(values.tolist()).most_common(1)[0]
                right = value if 2 * count > len(group) else values[0]
                wrong[replica.name] |= {rank for rank, value in zip(group, values, strict=True) if value != right}
    return [(name, sorted(ranks)) for name, ranks in wrong.items()]


def odd_weights(device: torch.device) -> Tensor:
    """CHUNK_ELEMENTS odd numbers of 64 bits, the same on every rank, as if drawn at random."""
    random = torch.Generator().manual_seed(0)
    whole = torch.randint(-(2**63), 2**63 - 1, (CHUNK_ELEMENTS,), generator=random)
    return (whole | 1).to(device)


def bit_hash(values: Sequence[Tensor], weights_on: Callable[[torch.device], Tensor] = odd_weights) -> Tensor:
    """A hash of the bits of tensors of 2 or 4 bytes an element, int64 scalar on their device; 0 of none.

    In each chunk the elements, read as integers, are multiplied by weights and summed, modulo 2^64; the chunks' sums
    are the digits of a number, modulo 2^64 too (multilinear hashing: Lemire and Kaser 2014, arXiv 1202.4961, section
    2). Integer arithmetic wraps around, so neither the order of summation nor the device matters.

    Two tensors that differ in one element alone never have the same hash: weights and factor are odd, which have
    inverses modulo 2^64, and the elements' difference is not 0 modulo 2^64. If they differ in several elements, swapped
    ones too, the hashes agree only if the weighted sum of the differences is 0 modulo 2^64: as each difference is less
    than 2^32, for random weights that happens with a probability of 2^-32 at most.
    """
    total = torch.zeros((), dtype=torch.int64)
    for tensor in values:
        weights = weights_on(tensor.device)
        for chunk in tensor.detach().reshape(-1).view(BITS[tensor.element_size()]).split(CHUNK_ELEMENTS):
            total = total.to(tensor.device) * CHUNK_FACTOR + (chunk * weights[: len(chunk)]).sum()
    return total
