"""How DeepSpeed 0.19.8 brings gradients from backward to their fp32 sums and between ranks, where we change that.

As `deepspeed_zero.py`, it reaches into what is pinned exactly.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pretrain.deepspeed_zero import Engine


def stage_in_fp32(engine: Engine) -> None:
    """At stage 2 let gradients that are reduced in fp32 wait for it in fp32.

    DeepSpeed's bucket is in 16 bits there, and converted when it is full. That rounds the gradients of what is kept in
    fp32 (routers), and all of them once more where they are divided by a number of ranks that is no power of two. The
    price is 2 bytes an element of a bucket while backward runs; converting it took as much. A gradient larger than a
    bucket is still reduced where it lies.
    """
    if engine.zero_optimization_stage() == 2 and engine.communication_data_type == torch.float32:
        engine.optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32


def sum_where_alone(engine: Engine) -> None:
    """At stages 1 and 2, where no other rank has this one's parameters, add gradients to their fp32 sums at once.

    DeepSpeed would copy them to fp32, into a bucket, divide them by one, reduce the bucket over one rank, add it to the
    sums and copy it back: five passes over all gradients, and twice their memory. A step's first micro-batch is copied:
    to add it, torch would first make an fp32 copy of it.
    """
    zero = engine.optimizer
    if (
        engine.zero_optimization_stage() not in (1, 2)
        or zero.cpu_offload
        or any(dist.get_world_size(group) > 1 for group in zero.real_dp_process_group)
        or not all(zero._use_compact_grad_partition_buffer(index) for index in range(len(zero.bit16_groups)))
    ):
        return

    summed: dict[int, set[int]] = {}  # parameters by group, whose sums have begun

    def add(parameter: nn.Parameter, group: int) -> None:
        if parameter.grad is None:
            return
        if zero.averaged_gradients.get(group) is None:
            summed[group] = set()
        number = zero.get_param_id(parameter)
        sums = zero._get_compact_grad_partition_slice(group, 0, number, parameter.numel())
        begun = summed.setdefault(group, set())
        if number in begun:
            sums.add_(parameter.grad.view(-1))
        else:
            sums.copy_(parameter.grad.view(-1))
            begun.add(number)
        parameter.grad = None

    zero.process_gradients = add
    zero.reduce_ipg_grads = lambda comm_dtype=None: None


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
