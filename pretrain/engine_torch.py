"""The oracle: the training step in plain torch, as short as it can be. Tests hold every other engine against it.

Data parallelism is a sum of gradients. In bf16 and fp16 the forward and backward run on low-precision copies of fp32
masters, and gradients are accumulated in fp32; there is no loss scaling, so fp16 here is for comparison only.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.batch import Batch
from model.decoder import Decoder
from model.parameters import buffer_shapes
from pretrain.boxes import Box, Piece
from pretrain.config import RunConfig
from pretrain.device import Stopwatch
from pretrain.engine import DTYPES, StepStats, balance_experts, decoder_inputs, global_valid_tokens
from pretrain.optimizers import build_optimizer, ensure_state, parameter_groups
from pretrain.regions import RegionClock
from pretrain.replicas import Replica, differing_replicas


class TorchEngine:
    """Plain torch, every rank holding everything."""

    def __init__(self, decoder: Decoder, config: RunConfig, device: torch.device) -> None:
        self.config, self.device, self.forward_watch = config, device, Stopwatch(device)
        self.masters = {name: nn.Parameter(value.detach().clone()) for name, value in decoder.named_parameters()}
        self.decoder = decoder.to(DTYPES[config.precision])
        groups = parameter_groups(self.masters.items(), config.optimizer)
        self.optimizer = build_optimizer(groups, config)

    def train_step(
        self,
        batches: Sequence[Batch],
        lr: float,
        before_update: Callable[[], None] = lambda: None,
        skip: bool = False,
    ) -> StepStats:
        """See Engine."""
        valid_tokens = global_valid_tokens(batches, self.device)
        sequences = sum(len(batch.tokens) for batch in batches) * (
            dist.get_world_size() if dist.is_initialized() else 1
        )
        nll = torch.zeros((), dtype=torch.float64, device=self.device)
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)
        for batch in batches:
            sums = self.decoder(**decoder_inputs(batch, self.device), z_loss=self.config.optimizer.z_loss)
            (sums.total / valid_tokens + sums.auxiliary / sequences).backward()
            nll += sums.nll
            for name, parameter in self.decoder.named_parameters():
                assert parameter.grad is not None
                self.masters[name].grad += parameter.grad  # type: ignore[operator]
                parameter.grad = None
        overflow = nll * 0  # not a number if the loss is none
        if dist.is_initialized():
            dist.all_reduce(overflow)
            for master in self.masters.values():
                dist.all_reduce(master.grad)
        grads = [master.grad for master in self.masters.values() if master.grad is not None]
        grad_norm = nn.utils.get_total_norm(grads) + overflow.float()
        if self.config.optimizer.grad_clip:
            nn.utils.clip_grads_with_norm_(self.masters.values(), self.config.optimizer.grad_clip, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        before_update()
        updated = grad_norm.isfinite() & (not skip)
        self._update(updated)
        return StepStats(nll, valid_tokens, grad_norm, balance_experts(self.decoder, updated))

    @torch.no_grad()
    def _update(self, updated: Tensor) -> None:
        """The optimizer's step, taken back unless `updated`: the host need not know."""
        live = [view for piece in self.pieces() for view in piece.views.values()]
        live += [state["step"] for state in self.optimizer.state.values()]
        before = [tensor.clone() for tensor in live]
        self.optimizer.step()
        for tensor, old in zip(live, before, strict=True):
            tensor.copy_(torch.where(updated, tensor, old))
        self._copy_masters()

    def timed(self, clock: RegionClock) -> AbstractContextManager[None]:
        """See Engine. An oracle is not timed: its step is whatever region was before."""
        return nullcontext()

    @torch.no_grad()
    def validation_nll(self, batch: Batch) -> Tensor:
        """See Engine."""
        self.decoder.eval()
        nll = self.decoder(**decoder_inputs(batch, self.device)).nll
        self.decoder.train()
        return nll

    def pieces(self) -> list[Piece]:
        """See Engine."""

        def whole(tensor: Tensor) -> Box:
            return Box((0,) * tensor.ndim, tuple(tensor.shape))

        writer = not dist.is_initialized() or dist.get_rank() == 0
        found = []
        group_of = {master: group for group in self.optimizer.param_groups for master in group["params"]}
        for name, master in self.masters.items():
            views = {"fp32": master.detach(), **ensure_state(self.optimizer, master, group_of[master])}
            found.append(Piece(name, tuple(master.shape), whole(master), writer, views))
        for name in buffer_shapes(self.config.model):
            buffer = self.decoder.get_buffer(name)
            found.append(Piece(name, tuple(buffer.shape), whole(buffer), writer, {"fp32": buffer}))
        return found

    def scalars(self) -> dict[str, Any]:
        """See Engine."""
        return {"optimizer_steps": max((int(state["step"]) for state in self.optimizer.state.values()), default=0)}

    def restored(self, scalars: dict[str, Any]) -> None:
        """See Engine."""
        for state in self.optimizer.state.values():
            state["step"].fill_(scalars["optimizer_steps"])
        self._copy_masters()

    def differing_replicas(self) -> list[tuple[str, list[int]]]:
        """See Engine."""
        ranks = range(dist.get_world_size() if dist.is_initialized() else 1)
        return differing_replicas(
            [Replica(piece.name, [ranks], [piece.views["fp32"]]) for piece in self.pieces()], self.device
        )

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for name, parameter in self.decoder.named_parameters():
            parameter.copy_(self.masters[name])
