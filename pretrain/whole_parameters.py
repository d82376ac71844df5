"""Parameters that ZeRO 3 is not told of: routers in fp32 beside a model in bf16.

DeepSpeed's stage 3 keeps all parameters in one dtype. Routers are small (experts x width a layer), so each rank holds
them whole, with their gradients, masters (themselves) and AdamW state, and updates them alike.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from pretrain.config import RunConfig
from pretrain.deepspeed_zero import shrink
from pretrain.gradient_norm import squared_norm
from pretrain.optimizers import build_optimizer, ensure_state, parameter_groups
from pretrain.parallel_dims import ParallelDims
from pretrain.placement import kept_beside_zero


class WholeParameters:
    """Parameters taken out of a module, which keeps using them as plain attributes, and their optimizer."""

    def __init__(self, model: nn.Module, config: RunConfig, dims: ParallelDims) -> None:
        self.dims = dims
        self.parameters = {name: p for name, p in model.named_parameters() if kept_beside_zero(name, config)}
        for name, parameter in self.parameters.items():
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            delattr(module, attribute)
            module.__dict__[attribute] = parameter  # nn.Module's own assignment would register it again
        groups = parameter_groups(self.parameters.items(), config.optimizer)
        self.optimizer: Any = build_optimizer(groups, config) if groups else None

    def reduce_gradients(self) -> None:
        """Average over the ranks with other tokens, as DeepSpeed does with the rest. Call once a step."""
        for parameter in self.parameters.values():
            assert parameter.grad is not None
            parameter.grad /= self.dims.size("token")
            self.dims.all_reduce(parameter.grad, "token")

    def squared_gradient_norms(self) -> Iterator[tuple[str, Tensor]]:
        """(name, squared L2 norm of its reduced gradient), the same on every rank."""
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            yield name, squared_norm(parameter.grad)

    def step(self, lr: float, factor: Tensor, update: bool) -> None:
        """Multiply gradients by what clips the global gradient, `update` if so told, and let go of them."""
        if self.optimizer is None:
            return
        if update:
            shrink(self.parameters.values(), factor)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()

    def views(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name, live tensors of its state by kind)."""
        for name, parameter in self.parameters.items():
            (group,) = self.optimizer.param_groups  # routers are all alike
            yield name, {"fp32": parameter.detach(), **ensure_state(self.optimizer, parameter, group)}

    def restored(self, optimizer_steps: int) -> None:
        """After `views` were written to."""
        for state in self.optimizer.state.values() if self.optimizer else ():
            state["step"].fill_(optimizer_steps)
