"""Which rank does what: coordinates and groups of a layout as pure arithmetic, and what makes a layout possible.

Ranks are numbered with the tensor-parallel ones side by side (they talk most), then the sequence-parallel ones, then
the data-parallel ones: rank = (data * S + sequence) * T + tensor. Expert parallelism divides the same ranks over again:
`expert` consecutive ranks, whatever else they are, share out the experts of each layer. No torch here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from model.config import has_experts, padded_vocab_size
from pretrain.config import RunConfig

# tensor       hold one shard of each matrix each, and between the matrices a part of the sequence
# sequence     hold a part of the sequence each, and all the parameters of their tensor shard
# sample       tensor x sequence: work on the same sequences
# token        data x sequence: hold the same parameters and see different tokens; DeepSpeed's data parallelism
# expert       share out the experts
# expert_data  hold the same experts
# kv_head      tensor-parallel ranks that hold the same key and value heads, there being fewer heads than ranks
Axis = Literal["tensor", "sequence", "sample", "token", "expert", "expert_data", "kv_head"]
AXES: tuple[Axis, ...] = ("tensor", "sequence", "sample", "token", "expert", "expert_data", "kv_head")


@dataclass(frozen=True)
class Layout:
    """Degrees of a layout. `kv_copies`: tensor-parallel ranks that share a key and value head."""

    world: int
    tensor: int = 1
    sequence: int = 1
    expert: int = 1
    kv_copies: int = 1

    @classmethod
    def of(cls, config: RunConfig, world: int) -> "Layout":
        """The layout of a run on so many ranks. Raises ValueError if it is impossible."""
        check_layout(config, world)
        parallel = config.parallel
        kv_copies = max(1, parallel.tensor // config.model.num_kv_heads)
        return cls(world, parallel.tensor, parallel.sequence, parallel.expert, kv_copies)

    @property
    def data(self) -> int:
        """The data-parallel degree."""
        return self.world // (self.tensor * self.sequence)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(data, sequence, tensor) of a rank."""
        rest, tensor = divmod(rank, self.tensor)
        data, sequence = divmod(rest, self.sequence)
        return data, sequence, tensor

    def group_of(self, rank: int, axis: Axis) -> range:
        """The ranks that this one forms the axis's group with, itself included, in the order of their coordinates."""
        size, stride = self._size_and_stride(axis)
        block = size * stride
        start = rank // block * block + rank % stride
        return range(start, start + block, stride)

    def groups(self, axis: Axis) -> Iterator[range]:
        """Every group of the axis, each once, in the order of their first ranks."""
        return (group for rank in range(self.world) if (group := self.group_of(rank, axis)).start == rank)

    def _size_and_stride(self, axis: Axis) -> tuple[int, int]:
        return {
            "tensor": (self.tensor, 1),
            "sequence": (self.sequence, self.tensor),
            "sample": (self.tensor * self.sequence, 1),
            "token": (self.world // self.tensor, self.tensor),
            "expert": (self.expert, 1),
            "expert_data": (self.world // self.expert, self.expert),
            "kv_head": (self.kv_copies, 1),
        }[axis]


def batch_sizes(config: RunConfig) -> list[int]:
    """Every global batch size that the run passes through, in order."""
    sizes = [size for _, size in config.batch.ramp] + [config.batch.global_batch_size]
    return sizes + [stage.global_batch_size for stage in config.data.stages if stage.global_batch_size]


def sequence_lengths(config: RunConfig) -> list[int]:
    """Every sequence length that the run passes through, in order."""
    later = [stage.sequence_length for stage in config.data.stages if stage.sequence_length]
    return [config.data.sequence_length, *later]


def micro_batches(config: RunConfig, global_batch_size: int, data_world: int) -> int:
    """Micro-batches (forward passes) of each data-parallel rank in one optimizer step.

    Raises ValueError if the global batch does not divide over `data_world` ranks.
    """
    share = config.batch.micro_batch_size * data_world
    if global_batch_size % share:
        fitting = [size for size in range(1, global_batch_size + 1) if global_batch_size % (size * data_world) == 0]
        of_ramp = global_batch_size in (size for _, size in config.batch.ramp)
        key = "batch.ramp: size" if of_ramp else "data.stages: global_batch_size"
        key = "batch.global_batch_size" if global_batch_size == config.batch.global_batch_size else key
        remedy = f"micro_batch_size may be {', '.join(map(str, fitting))}" if fitting else "use fewer ranks"
        raise ValueError(
            f"{key}={global_batch_size} is not a multiple of batch.micro_batch_size="
            f"{config.batch.micro_batch_size} times {data_world} data-parallel ranks ({share}): {remedy}"
        )
    return global_batch_size // share


def check_layout(config: RunConfig, world: int) -> None:
    """Raise ValueError where `config` cannot run on `world` ranks."""
    check_degrees(config)
    parallel = config.parallel
    if world % parallel.ranks_per_sample:
        raise ValueError(
            f"parallel.tensor={parallel.tensor} times parallel.sequence={parallel.sequence} does not divide {world} "
            f"ranks: use a multiple of {parallel.ranks_per_sample} ranks, or smaller degrees"
        )
    if world % parallel.expert:
        raise ValueError(
            f"parallel.expert={parallel.expert} does not divide {world} ranks: use a multiple of {parallel.expert} "
            "ranks, or a smaller degree"
        )
    for size in batch_sizes(config):
        micro_batches(config, size, world // parallel.ranks_per_sample)


def check_degrees(config: RunConfig) -> None:
    """Raise ValueError where the model cannot be split as `config.parallel` says, on any number of ranks."""
    degrees = {axis: getattr(config.parallel, axis) for axis in ("tensor", "sequence", "expert")}
    violation = _violation(config, degrees)
    if violation is None:
        return
    axis, broken = violation
    fitting = [other for other in SHARES if _violation(config, degrees | {axis: other}) is None]
    use = (
        f"use {'one of ' if len(fitting) > 1 else ''}{', '.join(map(str, fitting))}"
        if fitting
        else "change the other degrees"
    )
    raise ValueError(f"parallel.{axis}={degrees[axis]} {broken}: {use}")


SHARES = range(1, 129)  # the degrees that a remedy may name: who shares out a model further knows how


def _violation(config: RunConfig, degrees: Mapping[str, int]) -> tuple[str, str] | None:
    """Of these degrees the one that cannot be, and which rule it breaks; or None."""
    model, T, S, E = config.model, degrees["tensor"], degrees["sequence"], degrees["expert"]
    sizes = {"num_heads": model.num_heads, "vocab_size (padded)": padded_vocab_size(model.vocab_size)}
    if not all(has_experts(model, layer) for layer in range(model.num_layers)):
        sizes["ffn_size"] = model.ffn_size
    if model.moe is not None and model.moe.shared_experts:
        sizes["moe.shared_experts * expert_ffn_size"] = model.moe.shared_experts * model.moe.expert_ffn_size
    for key, size in sizes.items():
        if size % T:
            return "tensor", f"does not divide model.{key}={size}"
    if model.num_kv_heads % T and T % model.num_kv_heads:
        return "tensor", (
            f"neither divides model.num_kv_heads={model.num_kv_heads} nor is a multiple of it, so ranks cannot share "
            "key and value heads evenly"
        )
    if (model.num_heads // T) % S:
        return "sequence", (
            f"does not divide the {model.num_heads // T} query heads that parallel.tensor={T} leaves each rank of "
            f"model.num_heads={model.num_heads}, and attention is split by heads"
        )
    for length in sequence_lengths(config):
        if length % (T * S):
            return "sequence" if S > 1 else "tensor", (
                f"does not go with data.sequence_length={length}, which parallel.tensor={T} times "
                f"parallel.sequence={S} split and which is to be a multiple of {T * S}"
            )
    if E > 1 and model.moe is None:
        return "expert", "needs experts, and model.moe is not set"
    if model.moe is not None and model.moe.experts % E:
        return "expert", f"does not divide model.moe.experts={model.moe.experts}"
    return None
