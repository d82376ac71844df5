"""How DeepSpeed 0.19.8 brings gradients from backward to their fp32 sums and between ranks, where we change that.

As `deepspeed_zero.py`, it reaches into what is pinned exactly.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup
from torch import Tensor, nn

from pretrain.deepspeed_zero import Engine


def stage_in_fp32(engine: Engine) -> None:
    """At stage 2 let gradients that are reduced in fp32 wait for it in fp32.

    DeepSpeed's bucket is in 16 bits there, and converted when it is full. That rounds the gradients of what is kept in
    fp32 (routers), and all of them once more where they are divided by a number of ranks that is no power of two. A
    gradient that is larger than a bucket, and goes by itself, it divides in 16 bits, too. The price is 2 bytes an
    element of a bucket while backward runs; converting it took as much.
    """
    zero = engine.optimizer
    if engine.zero_optimization_stage() != 2 or engine.communication_data_type != torch.float32:
        return
    zero._gradient_reduction_buffer_dtype = lambda: torch.float32
    average = zero.average_tensor

    def average_in_fp32(tensor: Tensor, dtype: torch.dtype) -> None:
        converted = tensor.to(dtype)
        if converted is not tensor and zero.overlap_comm and zero.reduction_stream is not None:
            converted.record_stream(zero.reduction_stream)  # used there after it is let go of here
        average(converted, dtype)

    if _sums_in_fp32(zero):  # it adds what is reduced to these, and leaves the tensor to be forgotten
        zero.average_tensor = average_in_fp32


def _sums_in_fp32(zero: Any) -> bool:
    """Whether the sums of a 16-bit model's gradients are side by side in one fp32 tensor for each group."""
    return all(zero._use_compact_grad_partition_buffer(index) for index in range(len(zero.bit16_groups)))


def sum_where_alone(engine: Engine) -> None:
    """At stages 1 and 2, where no other rank has this one's parameters, add gradients to their fp32 sums at once.

    DeepSpeed would copy them to fp32, into a bucket, divide them by one, reduce the bucket over one rank, add it to the
    sums, which it has zeroed, and copy it back: six passes over all gradients, and twice their memory. A step's first
    micro-batch is copied: to add it, torch would first make an fp32 copy of it.
    """
    zero = engine.optimizer
    if (
        engine.zero_optimization_stage() not in (1, 2)
        or zero.cpu_offload
        or any(dist.get_world_size(group) > 1 for group in zero.real_dp_process_group)
        or not _sums_in_fp32(zero)
    ):
        return

    waiting: dict[int, dict[int, Tensor]] = {}  # by group and parameter, the sums of this step that have not begun

    def empty_sums(group: int) -> GradPartitionBufferGroup:
        """One flat tensor, and a view of it for each parameter: as DeepSpeed makes them, but not zeroed."""
        parameters = zero.params_in_partition[group]
        flat = torch.empty(int(zero.partition_size[group]), dtype=torch.float32, device=parameters[0].device)
        sizes = [parameter.numel() for parameter in parameters]
        *sums, padding = flat.split([*sizes, len(flat) - sum(sizes)])
        waiting[group] = {zero.get_param_id(parameter): own for parameter, own in zip(parameters, sums, strict=True)}
        padding.zero_()._zero_padding = True
        views = [own.view(parameter.shape) for parameter, own in zip(parameters, sums, strict=True)]
        return GradPartitionBufferGroup([*views, padding], flat)

    def add(parameter: nn.Parameter, group: int) -> None:
        if parameter.grad is None:
            return
        number = zero.get_param_id(parameter)
        sums = zero._get_compact_grad_partition_slice(group, 0, number, parameter.numel())
        if waiting[group].pop(number, None) is None:
            sums.add_(parameter.grad.view(-1))
        else:
            sums.copy_(parameter.grad.view(-1))
        parameter.grad = None

    def after_backward(comm_dtype: Any = None) -> None:
        """Zero what got no gradient."""
        for group in range(len(zero.bit16_groups)):
            zero._get_compact_grad_partition_buffer(group)
            while waiting[group]:
                waiting[group].popitem()[1].zero_()

    zero._build_compact_grad_partition_buffer = empty_sums
    zero.process_gradients = add
    zero.reduce_ipg_grads = after_backward


@contextmanager
def around_reductions(engine: Engine, inside: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """While this is open, whatever DeepSpeed does with gradients that are there is done inside a context of `inside()`:
    its hook after each parameter's gradient, and what it does at the end of a backward pass."""
    stage = engine.zero_optimization_stage()
    places = [(engine, "allreduce_gradients")]
    if stage:
        places.append(
            (engine.optimizer, "process_gradients" if stage < 3 else "reduce_ready_partitions_and_remove_grads")
        )
    before = [(owner, name, getattr(owner, name)) for owner, name in places]

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def reduce(*args: Any, **kwargs: Any) -> Any:
            with inside():
                return function(*args, **kwargs)

        return reduce

    for owner, name, function in before:
        setattr(owner, name, wrapped(function))
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
