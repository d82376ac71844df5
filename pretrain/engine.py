"""The engine: what the loop asks of whatever does the arithmetic. Two are behind it: plain torch, DeepSpeed.

Every loss is a sum over the targets that count, divided by their number over all ranks and micro-batches of the global
batch; so a layout, or how the targets happen to fall on ranks, does not change what is learned.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.batch import Batch
from model.decoder import Decoder
from model.init import initial_slice, initialise
from model.moe import MoE
from model.parameters import parameter_shapes
from pretrain.boxes import Piece
from pretrain.config import RunConfig
from pretrain.device import Stopwatch
from pretrain.parallel_dims import ParallelDims
from pretrain.regions import RegionClock

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class StepStats(NamedTuple):
    """What one optimizer step was, as scalars still on the device: nothing has been read yet.

    nll          this rank's share of the sum of -log p over the targets that count: all ranks' add up to the whole
    tokens       targets that counted, over all ranks and micro-batches
    grad_norm    L2 norm of the global gradient before clipping; not finite where any rank's gradient or loss is not
    expert_load  token-expert pairs of each layer with experts, (layers, E), over all ranks and micro-batches
    """

    nll: Tensor
    tokens: Tensor
    grad_norm: Tensor
    expert_load: Tensor | None = None


class Engine(Protocol):
    """Forward, backward, reduction and update, on any layout."""

    device: torch.device
    forward_watch: Stopwatch  # of a step's first forward pass

    def train_step(
        self,
        batches: Sequence[Batch],
        lr: float,
        before_update: Callable[[], None] = lambda: None,
        skip: bool = False,
    ) -> StepStats:
        """One optimizer step over this rank's micro-batches of a global batch. Collective.

        The update is left out, on every rank alike, where the gradient's norm is not finite: what `pieces` and the
        optimizer's counters show stays as it was, bit for bit, and the gradient is let go of. A loss scale is lowered.

        before_update: called when the gradients are there, before anything that `pieces` shows is changed.
        skip: leave the update out whatever the gradient is; the same on every rank. It does not touch a loss scale.
        """

    def timed(self, clock: RegionClock) -> AbstractContextManager[None]:
        """While this is open, the clock is told where a step is; whoever calls says what comes after it."""

    def validation_nll(self, batch: Batch) -> Tensor:
        """This rank's share of the sum of -log p over a batch's targets, without gradients. Collective."""

    def pieces(self) -> list[Piece]:
        """Live views of the masters and optimizer state that this rank holds, as boxes of logical tensors."""

    def scalars(self) -> dict[str, Any]:
        """The rest of the engine's state, as JSON values, equal on every rank."""

    def restored(self, scalars: dict[str, Any]) -> None:
        """Call after writing into `pieces()`: sets the scalars and renews what is derived from the masters."""

    def differing_replicas(self) -> list[tuple[str, list[int]]]:
        """(name, ranks) of each parameter or buffer of which ranks that are to hold the same values hold different
        bits: those that differ from most of them, or from the first. The same on every rank. Collective."""


class Status(NamedTuple):
    """What all ranks know about a step, alike on each: the ground on which they decide together.

    loss          mean of -log p over the global batch, nats a token
    tokens        targets it was taken over
    grad_norm     as in StepStats
    stop          some rank was asked to stop
    save          some rank was asked for a checkpoint
    failed        some rank cannot get its next batch
    data_seconds  time spent waiting for data, mean over ranks
    memory_bytes  peak memory of a rank, mean over ranks
    expert_load   as in StepStats; empty without experts
    """

    loss: float
    tokens: int
    grad_norm: float
    stop: bool
    save: bool
    failed: bool
    data_seconds: float
    memory_bytes: int
    expert_load: list[list[int]]

    @property
    def finite(self) -> bool:
        """Whether neither the loss nor the gradient overflowed, on any rank."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def agree(
    stats: StepStats,
    stop: bool = False,
    save: bool = False,
    failed: bool = False,
    data_seconds: float = 0.0,
    memory_bytes: int = 0,
) -> Status:
    """One small all-reduce and the step's only read by the host."""
    device, world = stats.nll.device, dist.get_world_size() if dist.is_initialized() else 1
    own = torch.tensor([stop, save, failed, data_seconds / world, memory_bytes / world], dtype=torch.float64)
    vector = torch.cat([stats.nll.double().reshape(1), own.to(device)])
    if dist.is_initialized():
        dist.all_reduce(vector)
    rest = [stats.tokens, stats.grad_norm.to(device)]
    if stats.expert_load is not None:
        rest.append(stats.expert_load)
    everything = torch.cat([vector, *(value.double().reshape(-1) for value in rest)])
    nll, stops, saves, failures, waited, memory, tokens, grad_norm, *pairs = everything.tolist()
    layers = 0 if stats.expert_load is None else len(stats.expert_load)
    experts = len(pairs) // max(layers, 1)
    load = [[int(n) for n in pairs[i * experts : (i + 1) * experts]] for i in range(layers)]
    asked = (stops > 0, saves > 0, failures > 0)
    return Status(nll / tokens, int(tokens), grad_norm, *asked, waited, int(memory), load)


def decoder_inputs(batch: Batch, device: torch.device, dims: ParallelDims | None = None) -> dict[str, Tensor | None]:
    """A batch as the decoder takes it: int64 tensors `(B, T)` on the device.

    Where sequence-parallel ranks share sequences out, this rank's part of tokens, targets and positions; the document
    ids stay whole, since attention sees whole sequences.
    """
    tokens, targets, positions = batch.tokens, batch.targets, batch.positions
    if dims is not None and dims.layout.sequence > 1:
        T = tokens.shape[1]
        if positions is None:
            positions = np.broadcast_to(np.arange(T), tokens.shape)
        part = T // dims.layout.sequence
        start = dims.index("sequence") * part
        tokens, targets, positions = (x[:, start : start + part].copy() for x in (tokens, targets, positions))
    arrays = {
        "tokens_BT": tokens,
        "targets_BT": targets,
        "positions_BT": positions,
        "document_ids_BT": batch.document_ids,
    }
    return {name: None if array is None else torch.from_numpy(array).to(device) for name, array in arrays.items()}


def global_valid_tokens(batches: Sequence[Batch], device: torch.device, ranks_per_sample: int = 1) -> Tensor:
    """Targets that count in the global batch, over all ranks and micro-batches; at least 1, so that it can divide.

    ranks_per_sample: how many ranks are given the same batches.
    """
    count = torch.tensor(float(sum(batch.valid_tokens for batch in batches)), dtype=torch.float64).to(device)
    if dist.is_initialized():
        dist.all_reduce(count)
    return (count / ranks_per_sample).clamp(min=1)


def balance_experts(decoder: Decoder, updated: bool | Tensor) -> Tensor | None:
    """The experts' load since the last call over all ranks, (layers, E), after it has moved the routers' biases; but
    not where the step has `updated` nothing else."""
    layers = [module for module in decoder.modules() if isinstance(module, MoE)]
    if not layers:
        return None
    load_LE = torch.stack([layer.take_load() for layer in layers])
    if dist.is_initialized():
        dist.all_reduce(load_LE)
    for layer, load_E in zip(layers, load_LE, strict=True):
        if layer.router.bias is not None:
            layer.router.update_bias(load_E * updated)
    return load_LE


def build_decoder(config: RunConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    """The whole model at step 0 on one device, as it is before anything is laid out."""
    with device:
        decoder = Decoder(config.model)
    initialise(decoder, config.seed)
    return decoder.to(dtype)


@torch.no_grad()
def write_initial_values(engine: Engine, config: RunConfig) -> None:
    """Write what this rank holds of the model at step 0: a function of the seed and of each parameter's name and
    indices, so the same bits on any layout. Only this rank's own boxes are ever made."""
    trained = parameter_shapes(config.model)  # buffers start at 0
    for piece in engine.pieces():
        if piece.name not in trained:
            continue
        box = [slice(i, i + n) for i, n in zip(piece.box.offset, piece.box.size, strict=True)]
        piece.views["fp32"].copy_(initial_slice(piece.name, piece.shape, box, config.seed, config.model))


def build_engine(config: RunConfig, device: torch.device, dims: ParallelDims) -> Engine:
    """The product's engine, at step 0."""
    from pretrain.engine_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, device, dims)
