"""The engine: what the loop asks of whatever does the arithmetic. Two are behind it: plain torch, DeepSpeed.

Every loss is a sum over the targets that count, divided by their number over all ranks and micro-batches of the global
batch; so a layout, or how the targets happen to fall on ranks, does not change what is learned.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.batch import Batch
from model.decoder import Decoder
from model.init import initialise
from pretrain.boxes import Piece
from pretrain.config import RunConfig
from pretrain.parallel_dims import ParallelDims
from pretrain.parallelize import parallelize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class StepStats(NamedTuple):
    """What one optimizer step was, as scalars still on the device: nothing has been read yet.

    nll        this rank's sum of -log p over its targets that count
    tokens     targets that counted, over all ranks and micro-batches
    grad_norm  L2 norm of the global gradient before clipping
    """

    nll: Tensor
    tokens: Tensor
    grad_norm: Tensor


class Engine(Protocol):
    """Forward, backward, reduction and update, on any layout."""

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepStats:
        """One optimizer step over this rank's micro-batches of a global batch. Collective."""

    def validation_nll(self, batch: Batch) -> Tensor:
        """Sum of -log p over a batch's targets, on this rank, without gradients. Every rank calls it equally often."""

    def pieces(self) -> list[Piece]:
        """Live views of the masters and optimizer state that this rank holds, as boxes of logical tensors."""

    def scalars(self) -> dict[str, Any]:
        """The rest of the engine's state, as JSON values, equal on every rank."""

    def restored(self, scalars: dict[str, Any]) -> None:
        """Call after writing into `pieces()`: sets the scalars and renews what is derived from the masters."""


class Status(NamedTuple):
    """What all ranks know about a step, alike on each: the ground on which they decide together.

    loss          mean of -log p over the global batch, nats a token
    tokens        targets it was taken over
    grad_norm     as in StepStats
    stop          some rank was asked to stop
    failed        some rank cannot get its next batch
    data_seconds  time spent waiting for data, mean over ranks
    memory_bytes  peak memory of a rank, mean over ranks
    """

    loss: float
    tokens: int
    grad_norm: float
    stop: bool
    failed: bool
    data_seconds: float
    memory_bytes: int

    @property
    def finite(self) -> bool:
        """Whether neither the loss nor the gradient overflowed, on any rank."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def agree(
    stats: StepStats, stop: bool = False, failed: bool = False, data_seconds: float = 0.0, memory_bytes: int = 0
) -> Status:
    """One small all-reduce and the step's only read by the host."""
    device, world = stats.nll.device, dist.get_world_size() if dist.is_initialized() else 1
    own = torch.tensor([stop, failed, data_seconds / world, memory_bytes / world], dtype=torch.float64)
    vector = torch.cat([stats.nll.double().reshape(1), own.to(device)])
    if dist.is_initialized():
        dist.all_reduce(vector)
    everything = torch.cat([vector, stats.tokens.double().reshape(1), stats.grad_norm.to(device).double().reshape(1)])
    nll, stops, failures, waited, memory, tokens, grad_norm = everything.tolist()
    return Status(nll / tokens, int(tokens), grad_norm, stops > 0, failures > 0, waited, int(memory))


def decoder_inputs(batch: Batch, device: torch.device) -> dict[str, Tensor | None]:
    """A batch as the decoder takes it: int64 tensors `(B, T)` on the device."""
    arrays = {
        "tokens_BT": batch.tokens,
        "targets_BT": batch.targets,
        "positions_BT": batch.positions,
        "document_ids_BT": batch.document_ids,
    }
    return {name: None if array is None else torch.from_numpy(array).to(device) for name, array in arrays.items()}


def global_valid_tokens(batches: Sequence[Batch], device: torch.device) -> Tensor:
    """Targets that count in the global batch, over all ranks and micro-batches; at least 1, so that it can divide."""
    count = torch.tensor(float(sum(batch.valid_tokens for batch in batches)), dtype=torch.float64).to(device)
    if dist.is_initialized():
        dist.all_reduce(count)
    return count.clamp(min=1)


def build_decoder(config: RunConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    """The model at step 0: its values are a function of the seed and of each parameter's name, on any layout."""
    with device:
        decoder = Decoder(config.model)
    initialise(decoder, config.seed)
    return parallelize(decoder, config.parallel).to(dtype)


def build_engine(config: RunConfig, device: torch.device, dims: ParallelDims) -> Engine:
    """The product's engine: DeepSpeed, over a fresh model."""
    from pretrain.engine_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(build_decoder(config, device, torch.float32), config, device, dims)
