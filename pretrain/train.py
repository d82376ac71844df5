"""The loop: data, forward, backward, step, agree, log, validate, save. It never asks how a model is laid out."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.loader import Loader
from data_pipeline.manifest import Manifest
from model.accounting import flops_per_token
from model.config import has_experts
from pretrain.checkpoint.load import load_initial_weights, load_newest
from pretrain.checkpoint.save import CheckpointSaver
from pretrain.config import RunConfig
from pretrain.device import new_cpu_group, peak_flops, peak_memory_bytes
from pretrain.early_warnings import EarlyWarnings
from pretrain.engine import DTYPES, Engine, Status, agree, build_engine
from pretrain.health import Health, Rewound
from pretrain.outcome import EXIT_DONE, EXIT_STOPPED, Outcome, exit_code_of
from pretrain.parallel_dims import ParallelDims, first_of, gathered
from pretrain.recorder import Recorder, RunRecorder, SilentRecorder
from pretrain.run_dir import RunDir
from pretrain.schedule import batch_plan, due, finished, learning_rate
from pretrain.state import TrainState
from pretrain.stop import StopRequest, Switches
from pretrain.validation import mean_loss, past_losses, validate
from pretrain.watchdog import Watchdog

SAVE_PATIENCE = timedelta(days=7)  # a rank that dies is noticed at once, one whose disk is slow may take its time


def train(
    run_dir: RunDir,
    config: RunConfig,
    device: torch.device,
    stop: StopRequest,
    watchdog: Watchdog,
    stop_after: int | None,
) -> Outcome:
    """Train from the newest checkpoint, or from the seed, until the schedule ends, `stop_after` steps are made, some
    rank is asked to stop, or some rank cannot go on. Collective; the outcome is the same on every rank.

    Raises ValueError on every rank if the checkpoints or the held-out data cannot be read, CheckpointError if the last
    checkpoint cannot be written.
    """
    dims = ParallelDims.of_this_rank(config)
    host_group = new_cpu_group() if dims.layout.world > 1 else None
    save_group = new_cpu_group(SAVE_PATIENCE) if dims.layout.world > 1 else None
    engine = build_engine(config, device, dims)
    watchdog.beat(0, "loading")
    state, origin = restore(run_dir, config, engine, host_group)
    if finished(config.schedule, state.step, state.tokens) or (stop_after is not None and state.step >= stop_after):
        return Outcome("done", EXIT_DONE, state.step, f"step {state.step}: the run has come that far already; {origin}")
    losses = past_losses(run_dir, state.step) if config.checkpoint.keep_best and dims.rank == 0 else {}
    with ExitStack() as opened:
        recorder = opened.enter_context(closing(open_recorder(run_dir, config, state, dims)))
        recorder.event("start", f"{config.name}: {origin}", step=state.step, ranks=dims.layout.world)
        begin_stages(config, state, recorder)
        meter = Meter(config, device, dims, recorder)
        # Looked at once, not by each rank: that is a call a shard of the shared file system.
        manifests = first_of(lambda: {s.path: Manifest.load(s.path) for s in config.data.sources}, host_group)
        loader = opened.enter_context(closing(open_loader(config, state, dims, manifests)))
        saver = CheckpointSaver(
            run_dir.checkpoints, engine, config, run_dir.tokenizer_path, save_group, losses, recorder.saved
        )
        opened.enter_context(closing(saver))
        health, switches = Health(config, engine), Switches(run_dir, dims.rank)
        warnings = EarlyWarnings(run_dir, config, dims.rank, host_group, recorder)
        stop.begin()
        if config.health.spike_zscore and state.step == 0:
            saver.start(state)  # something to go back to

        outcome = missing_data(loader, state.step, host_group)
        while outcome is None:
            watchdog.beat(state.step + 1, "step")
            meter.begin()
            lr = learning_rate(config, state.step, state.tokens)
            skip = state.step + 1 in config.skips.updates
            batches = next(loader)
            stats = engine.train_step(batches, lr, before_update=saver.staged, skip=skip)
            with meter.waiting_for_data():
                failed = loader.failure is not None  # the next batch is there, or never will be
            to_stop, to_save = switches.look()
            status = agree(stats, stop.asked or to_stop, to_save, failed, meter.data_seconds, peak_memory_bytes(device))
            sequences = sum(len(batch.tokens) for batch in batches) * dims.data_world
            state.advance(sequences, config.data.sequence_length)
            meter.record(state, status, lr, sequences, skipped=skip or not status.finite)
            warnings.after_step(state.step, engine.forward_watch.seconds)
            saver.poll()

            if (zscore := health.zscore(state, status)) is not None:
                watchdog.beat(state.step, "going back")
                saver.close()
                rewound = health.go_back(run_dir.checkpoints, state, host_group)
                if isinstance(rewound, Rewound):
                    recorder.rewound(rewound, zscore)
                    state = rewound.state
                    loader.close()
                    loader = opened.enter_context(closing(open_loader(config, state, dims, manifests)))
                    continue
                outcome = rewound
            outcome = outcome or health.unsound(state, status)
            sound = outcome is None
            outcome = outcome or ending(config, state, status, stop_after)
            if outcome is None and status.failed:
                outcome = missing_data(loader, state.step, host_group)
            if sound and (outcome is not None or status.save or due(config.checkpoint.every_steps, state.step)):
                watchdog.beat(state.step, "saving")
                saver.start(state)
                switches.done()
            hurried = outcome is not None and outcome.status != "done"
            if sound and not hurried and due(config.evaluation.every_steps, state.step):
                began, beat = time.perf_counter(), partial(watchdog.beat, state.step, "validation")
                by_source = validate(engine, config, device, dims, host_group, beat)
                losses[state.step] = mean_loss(by_source)
                recorder.validation(state.step, state.tokens, by_source, time.perf_counter() - began)
        if outcome.status != "failed":  # else that is what is told, whatever becomes of the last save
            watchdog.beat(state.step, "saving")
            saver.wait()
        recorder.event("end", step=state.step, status=outcome.status, message=outcome.message)
        return outcome


def begin_stages(config: RunConfig, state: TrainState, recorder: Recorder) -> None:
    """What the config says of the sample order from here on, if it is new: a mixture, ranges that are left out."""
    mixture = {source.name: source.weight for source in config.data.sources}
    if state.set_mixture(mixture):
        recorder.event("stage", step=state.step, position=state.position, weights=mixture)
    if left_out := state.leave_out(config.skips.data):
        recorder.event("left_out", step=state.step, ranges=left_out)


def ending(config: RunConfig, state: TrainState, status: Status, stop_after: int | None) -> Outcome | None:
    """How the run ends after this step, or None if it goes on. The same on every rank, since the status is."""
    if finished(config.schedule, state.step, state.tokens):
        return Outcome("done", EXIT_DONE, state.step, f"step {state.step}: the run is complete")
    if stop_after is not None and state.step >= stop_after:
        return Outcome("done", EXIT_DONE, state.step, f"step {state.step}: stopped early as --stop-after asked")
    if status.stop:
        return Outcome("stopped", EXIT_STOPPED, state.step, f"step {state.step}: stopped on request, checkpointed")
    return None


def missing_data(loader: Loader, step: int, group: dist.ProcessGroup | None) -> Outcome | None:
    """An outcome if any rank cannot get its next batch. Collective, so that no rank waits for one that gave up."""
    error = loader.failure
    own = None if error is None else (exit_code_of(error), str(error) or type(error).__name__)
    for failure in gathered(own, group):
        if failure is not None:
            return Outcome("failed", failure[0], step, failure[1])
    return None


def restore(
    run_dir: RunDir, config: RunConfig, engine: Engine, group: dist.ProcessGroup | None
) -> tuple[TrainState, str]:
    """The state to train from, loaded into the engine, and where it comes from, in words."""
    restored = load_newest(run_dir.checkpoints, engine, group)
    if restored.checkpoint is not None:
        notes = "".join(f" (passed over: {reason})" for reason in restored.passed_over)
        return restored.state, f"resumes after step {restored.state.step} from {restored.checkpoint}{notes}"
    if config.init_from is not None:
        load_initial_weights(Path(config.init_from), engine, group)
        return restored.state, f"starts from the weights of {config.init_from}"
    return restored.state, "no checkpoint, trains from scratch"


def open_loader(config: RunConfig, state: TrainState, dims: ParallelDims, manifests: Mapping[str, Manifest]) -> Loader:
    """The loader from the state's position on."""
    return Loader(
        data=config.data,
        seed=config.seed,
        stages=state.stages,
        data_rank=dims.data_rank,
        data_world=dims.data_world,
        micro_batch_size=config.batch.micro_batch_size,
        document_mask=config.model.document_mask,
        plan=batch_plan(config, state.position, state.tokens, state.left_out),
        manifests=manifests,
    )


def open_recorder(run_dir: RunDir, config: RunConfig, state: TrainState, dims: ParallelDims) -> Recorder:
    """Rank 0 records, the others are silent."""
    if dims.rank != 0:
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
        say = f"MFU is against {self.peak / 1e12:.2f} TFLOP/s in all ({source})"
        figures = {"flops_per_second": self.peak, "source": source, "flops_per_token": self.flops_per_token}
        self.recorder.event("peak", say, **figures)
        model = self.config.model
        self.expert_layers = [layer for layer in range(model.num_layers) if has_experts(model, layer)]
        self.data_seconds = self.started = 0.0

    def begin(self) -> None:
        """A step begins."""
        self.started = time.perf_counter()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around whatever waits for the next batches."""
        started = time.perf_counter()
        yield
        self.data_seconds = time.perf_counter() - started

    def record(self, state: TrainState, status: Status, lr: float, sequences: int, skipped: bool) -> None:
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
            skipped=skipped,
            expert_load=dict(zip(self.expert_layers, status.expert_load, strict=True)),
        )
