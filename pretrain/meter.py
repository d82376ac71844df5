"""Times each step, and turns what the ranks know of it into a step event."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from model.accounting import flops_per_token
from model.config import has_experts
from pretrain.config import RunConfig
from pretrain.device import peak_flops
from pretrain.engine import DTYPES, Status
from pretrain.recorder import Recorder
from pretrain.state import TrainState


@dataclass
class Meter:
    """Of one attempt. Making one is collective: MFU is against the peak of all devices."""

    config: RunConfig
    device: torch.device
    recorder: Recorder

    def __post_init__(self) -> None:
        peak, self.peak_source = peak_flops(self.device, DTYPES[self.config.precision])
        total = torch.tensor(peak, dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(total)
        self.peak = float(total)
        at_first = flops_per_token(self.config.model, self.config.data.sequence_length)
        say = f"MFU is against {self.peak / 1e12:.2f} TFLOP/s in all ({self.peak_source})"
        figures = {"flops_per_second": self.peak, "source": self.peak_source, "flops_per_token": at_first}
        self.recorder.event("peak", say, **figures)
        model = self.config.model
        self.expert_layers = [layer for layer in range(model.num_layers) if has_experts(model, layer)]
        self.data_seconds = self.started = 0.0
        self.tokens = self.flops = 0  # of this attempt's steps

    def begin(self) -> None:
        """A step begins."""
        self.started = time.perf_counter()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around whatever waits for the next batches."""
        started = time.perf_counter()
        yield
        self.data_seconds = time.perf_counter() - started

    def record(self, state: TrainState, status: Status, lr: float, tokens_in_step: int, skipped: bool) -> None:
        """The step is done. MFU: the model's own FLOPs (`model/accounting.py`) against the peak of all devices."""
        seconds = time.perf_counter() - self.started
        flops = flops_per_token(self.config.model, state.stages[-1].sequence_length)
        speed = tokens_in_step / seconds
        self.tokens += tokens_in_step
        self.flops += tokens_in_step * flops
        self.recorder.step(
            step=state.step,
            loss=status.loss,
            grad_norm=status.grad_norm,
            lr=lr,
            tokens=state.tokens,
            tokens_per_second=speed,
            mfu=speed * flops / self.peak,
            position=state.position,
            tokens_in_step=tokens_in_step,
            targets_in_step=status.tokens,
            step_seconds=seconds,
            data_seconds=status.data_seconds,
            memory_bytes=status.memory_bytes,
            skipped=skipped,
            expert_load=dict(zip(self.expert_layers, status.expert_load, strict=True)),
        )
