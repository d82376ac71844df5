"""What is done to a pure model from outside, in one stated order: placement, kernels, tensor, expert and sequence
parallelism, activation checkpointing, compilation.

A parameter keeps its logical name; what a rank holds of it is a box (`pretrain/placement.py`). The model is built on
the meta device and each parameter becomes real as this rank's box alone, without values: the engine writes them, from
the seed or from a checkpoint, into whatever it has made of them.

Random numbers: initial values come from (seed, name, global index), and training draws none, so neither the regions
that tensor-parallel ranks hold alike nor those they share out have a random stream to keep in step.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.config import ModelConfig
from model.decoder import Decoder
from model.parameters import buffer_shapes, keeps_fp32, parameter_shapes
from pretrain.activation_checkpointing import apply_activation_checkpointing
from pretrain.compile import compile_blocks
from pretrain.config import RunConfig
from pretrain.expert_parallel import apply_expert_parallelism, sum_load_over_sequences
from pretrain.kernels import apply_kernels
from pretrain.parallel_dims import ParallelDims
from pretrain.placement import Placement, placement
from pretrain.sequence_parallel import apply_sequence_parallelism
from pretrain.tensor_parallel import apply_tensor_parallelism


def placements(config: ModelConfig, dims: ParallelDims) -> dict[str, Placement]:
    """Where each parameter and persistent buffer lies, by logical name."""
    shapes = parameter_shapes(config) | buffer_shapes(config)
    return {name: placement(name, shape, dims.layout, dims.rank) for name, shape in shapes.items()}


def parallelize(
    config: RunConfig,
    device: torch.device,
    dtype: torch.dtype,
    dims: ParallelDims,
    made: Callable[[str, nn.Parameter], None] = lambda name, parameter: None,
) -> Decoder:
    """This rank's part of the run's decoder on `device`, its values undefined. Norms, matrices and activations are in
    `dtype`, routers in fp32.

    made: called with each parameter as soon as it has memory, before the next one has; ZeRO 3 partitions it there, so
    that no more than one whole parameter of a rank's shard exists at a time.
    """
    with torch.device("meta"):
        decoder = Decoder(config.model)
    places = placements(config.model, dims)
    for name, _ in list(decoder.named_parameters()):
        box = places[name].box
        own = nn.Parameter(torch.empty(box.size, dtype=torch.float32 if keeps_fp32(name) else dtype, device=device))
        module, _, attribute = name.rpartition(".")
        setattr(decoder.get_submodule(module), attribute, own)
        if (copies := places[name].copies) is not None:
            own.register_hook(_summed_over(dims.groups[copies]))
        made(name, own)
    for name, buffer in list(decoder.named_buffers()):
        module, _, attribute = name.rpartition(".")
        setattr(decoder.get_submodule(module), attribute, torch.zeros_like(buffer, device=device))
    apply_kernels(decoder, device, config.parallel)
    if dims.layout.tensor > 1:
        apply_tensor_parallelism(decoder, dims)
    if dims.layout.expert > 1:
        apply_expert_parallelism(decoder, dims)
    if dims.layout.sequence > 1:
        apply_sequence_parallelism(decoder, dims)
    if dims.groups["sample"] is not None:
        sum_load_over_sequences(decoder, dims)
    apply_activation_checkpointing(decoder, config.parallel)
    if config.parallel.compile:
        compile_blocks(decoder)
    return decoder


def _summed_over(group: dist.ProcessGroup | None) -> Callable[[Tensor], Tensor]:
    """A gradient hook for a parameter that each rank of the group holds and only all together see used.

    Autograd calls it once a backward pass, on every rank in the same order, before DeepSpeed takes the gradient. It
    sums in fp32: rounded to bf16, parts of a sum would lose what the whole has.
    """

    def total(grad: Tensor) -> Tensor:
        summed = grad.float() if grad.dtype != torch.float32 else grad.clone()
        dist.all_reduce(summed, group=group)
        return summed.to(grad.dtype)

    return total
