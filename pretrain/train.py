"""The loop: data, forward, backward, step, agree, log, validate, save. It never asks how a model is laid out."""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data_pipeline.loader import Loader
from model.accounting import flops_per_token
from pretrain.checkpoint import load_checkpoint, newest_checkpoint, prune_checkpoints, save_checkpoint
from pretrain.config import RunConfig
from pretrain.device import new_cpu_group, peak_flops, peak_memory_bytes
from pretrain.engine import DTYPES, Engine, Status, agree, build_engine
from pretrain.outcome import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_WRONG_INPUT, Outcome
from pretrain.parallel_dims import ParallelDims
from pretrain.recorder import Recorder, RunRecorder, SilentRecorder
from pretrain.run_dir import RunDir, read_json
from pretrain.schedule import batch_plan, finished, learning_rate
from pretrain.state import TrainState
from pretrain.stop import StopRequest
from pretrain.validation import validate


def train(run_dir: RunDir, config: RunConfig, device: torch.device, stop_after: int | None) -> Outcome:
    """Train from the newest checkpoint, or from the seed, until the schedule ends, `stop_after` steps are made, some
    rank is asked to stop, or some rank cannot go on. Collective; the outcome is the same on every rank."""
    stop = StopRequest()
    dims = ParallelDims.of_this_rank()
    host_group = new_cpu_group() if dims.data_world > 1 else None
    engine = build_engine(config, device, dims)
    state, origin = restore(run_dir, engine)
    mixture = {source.name: source.weight for source in config.data.sources}
    if finished(config.schedule, state.step, state.tokens):
        return Outcome("done", EXIT_DONE, state.step, f"step {state.step}: the run was complete already")
    recorder = open_recorder(run_dir, config, state, dims)
    recorder.event("start", f"{config.name}: {origin}", step=state.step, ranks=dims.data_world)
    if state.set_mixture(mixture):
        recorder.event("stage", step=state.step, position=state.position, weights=mixture)
    meter = Meter(config, device, dims, recorder)
    loader = open_loader(config, state, dims)
    fingerprint = read_json(run_dir.data_path)["tokenizer"]

    def save() -> None:
        path = save_checkpoint(run_dir.checkpoints, engine, state, config, fingerprint, host_group)
        if dims.data_rank == 0:
            prune_checkpoints(run_dir.checkpoints, config.checkpoint.keep)
        recorder.event("checkpoint", f"step {state.step}: saved {path}", step=state.step, path=str(path))

    try:
        outcome = missing_data(loader, state.step, host_group)
        batches = iter(loader)
        while outcome is None:
            meter.begin()
            lr = learning_rate(config, state.step, state.tokens)
            step_batches = next(batches)
            meter.data_arrived()
            stats = engine.train_step(step_batches, lr)
            failed = loader.failure is not None
            status = agree(stats, stop.asked, failed, meter.data_seconds, peak_memory_bytes(device))
            sequences = sum(len(batch.tokens) for batch in step_batches) * dims.data_world
            state.advance(sequences, config.data.sequence_length)
            meter.record(state, status, lr, sequences)

            outcome = ending(config, state, status, stop_after) or (
                missing_data(loader, state.step, host_group) if status.failed else None
            )
            if due(config.evaluation.every_steps, state.step) and status.finite:
                recorder.validation(state.step, state.tokens, validate(engine, config, device, dims))
            sound = status.finite or config.precision == "fp16"
            if sound and (outcome is not None or due(config.checkpoint.every_steps, state.step)):
                save()
        recorder.event("end", step=state.step, status=outcome.status, message=outcome.message)
        return outcome
    finally:
        loader.close()
        recorder.close()


def due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


def ending(config: RunConfig, state: TrainState, status: Status, stop_after: int | None) -> Outcome | None:
    """How the run ends after this step, or None if it goes on. The same on every rank, since the status is."""
    if not status.finite and config.precision != "fp16":  # fp16 skips such a step and lowers its loss scale
        return Outcome(
            "failed",
            EXIT_FAILED,
            state.step,
            f"step {state.step}: loss {status.loss} with gradient norm {status.grad_norm}, not a number to train on; "
            "resume from the last checkpoint with a lower optimizer.lr",
        )
    if finished(config.schedule, state.step, state.tokens):
        return Outcome("done", EXIT_DONE, state.step, f"step {state.step}: the run is complete")
    if stop_after is not None and state.step >= stop_after:
        return Outcome("done", EXIT_DONE, state.step, f"step {state.step}: stopped early as --stop-after asked")
    if status.stop:
        return Outcome("stopped", EXIT_STOPPED, state.step, f"step {state.step}: stopped on request, checkpointed")
    return None


def missing_data(loader: Loader, step: int, group: dist.ProcessGroup | None) -> Outcome | None:
    """An outcome if any rank cannot get its next batch. Collective, so that no rank waits for one that gave up."""
    own = str(loader.failure) if loader.failure is not None else None
    failures: list[str | None] = [own]
    if group is not None:
        failures = [None] * dist.get_world_size(group)
        dist.all_gather_object(failures, own, group=group)
    first = next((failure for failure in failures if failure), None)
    return Outcome("failed", EXIT_WRONG_INPUT, step, first) if first else None


def restore(run_dir: RunDir, engine: Engine) -> tuple[TrainState, str]:
    """The state to train from, loaded into the engine, and where it comes from, in words."""
    passed_over: list[str] = []
    checkpoint = newest_checkpoint(run_dir.checkpoints, passed_over)
    notes = "".join(f" (passed over: {reason})" for reason in passed_over)
    if checkpoint is None:
        return TrainState(), f"no checkpoint, trains from scratch{notes}"
    state = load_checkpoint(checkpoint, engine)
    return state, f"resumes after step {state.step} from {checkpoint}{notes}"


def open_loader(config: RunConfig, state: TrainState, dims: ParallelDims) -> Loader:
    """The loader from the state's position on."""
    return Loader(
        data=config.data,
        seed=config.seed,
        stages=state.stages,
        data_rank=dims.data_rank,
        data_world=dims.data_world,
        micro_batch_size=config.batch.micro_batch_size,
        document_mask=config.model.document_mask,
        plan=batch_plan(config, state.position, state.tokens),
    )


def open_recorder(run_dir: RunDir, config: RunConfig, state: TrainState, dims: ParallelDims) -> Recorder:
    """Rank 0 records, the others are silent."""
    if dims.data_rank != 0:
        return SilentRecorder()
    return RunRecorder(run_dir, state.step, config.schedule.total_steps, config.schedule.total_tokens)


@dataclass
class Meter:
    """Times a step and turns its status into a step event."""

    config: RunConfig
    device: torch.device
    dims: ParallelDims
    recorder: Recorder

    def __post_init__(self) -> None:
        peak, source = peak_flops(self.device, DTYPES[self.config.precision])
        total = torch.tensor(peak, dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(total)
        self.peak = float(total)
        self.flops_per_token = flops_per_token(self.config.model, self.config.data.sequence_length)
        say = f"MFU is against {self.peak / 1e12:.2f} TFLOP/s for {self.dims.data_world} ranks ({source})"
        figures = {"flops_per_second": self.peak, "source": source, "flops_per_token": self.flops_per_token}
        self.recorder.event("peak", say, **figures)
        self.data_seconds = self.started = 0.0

    def begin(self) -> None:
        """A step begins."""
        self.started = time.perf_counter()

    def data_arrived(self) -> None:
        """The step has its batches."""
        self.data_seconds = time.perf_counter() - self.started

    def record(self, state: TrainState, status: Status, lr: float, sequences: int) -> None:
        """The step is done. MFU: the model's own FLOPs (`model/accounting.py`) against the peak of all devices."""
        seconds = time.perf_counter() - self.started
        tokens_in_step = sequences * self.config.data.sequence_length
        speed = tokens_in_step / seconds
        self.recorder.step(
            step=state.step,
            loss=status.loss,
            grad_norm=status.grad_norm,
            lr=lr,
            tokens=state.tokens,
            tokens_per_second=speed,
            mfu=speed * self.flops_per_token / self.peak,
            position=state.position,
            tokens_in_step=tokens_in_step,
            targets_in_step=status.tokens,
            step_seconds=seconds,
            data_seconds=status.data_seconds,
            memory_bytes=status.memory_bytes,
            skipped=not status.finite,
        )
