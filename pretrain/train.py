"""The loop: data, forward, backward, step, agree, log, validate, save. It never asks how a model is laid out."""

import time
from contextlib import ExitStack, closing
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.batches import Batches
from pretrain.checkpoint.load import load_initial_weights, load_newest
from pretrain.checkpoint.save import CheckpointSaver
from pretrain.config import RunConfig
from pretrain.device import new_cpu_group, peak_memory_bytes
from pretrain.early_warnings import EarlyWarnings
from pretrain.engine import Engine, Status, agree, build_engine
from pretrain.health import Health
from pretrain.meter import Meter
from pretrain.outcome import EXIT_DONE, EXIT_STOPPED, Outcome
from pretrain.parallel_dims import ParallelDims
from pretrain.profile_request import ProfileRequest, check_profile
from pretrain.profiler import open_profiler
from pretrain.recorder import Recorder, RunRecorder, SilentRecorder
from pretrain.run_dir import RunDir
from pretrain.schedule import due, finished, last_step_asked, learning_rate
from pretrain.state import TrainState
from pretrain.stop import StopRequest, Switches
from pretrain.validation import Validation, forget_after, mean_loss, past_losses
from pretrain.watchdog import START_SECONDS, Watchdog

SAVE_PATIENCE = timedelta(days=7)  # a rank that dies is noticed at once, one whose disk is slow may take its time


def train(
    run_dir: RunDir,
    config: RunConfig,
    device: torch.device,
    stop: StopRequest,
    watchdog: Watchdog,
    stop_after: int | None,
    profile: ProfileRequest | None = None,
) -> Outcome:
    """Train from the newest checkpoint, or from the seed, until the schedule ends, `stop_after` steps are made, some
    rank is asked to stop, or some rank cannot go on. Collective; the outcome is the same on every rank.

    Raises ValueError on every rank if the checkpoints or the held-out data cannot be read, or if there are not as many
    steps left as `profile` asks for; CheckpointError if the last checkpoint cannot be written.
    """
    dims = ParallelDims.of_this_rank(config)
    host_group = new_cpu_group() if dims.layout.world > 1 else None
    save_group = new_cpu_group(SAVE_PATIENCE) if dims.layout.world > 1 else None
    engine = build_engine(config, device, dims)
    watchdog.beat(0, "loading")
    state, origin = restore(run_dir, config, engine, host_group)
    if finished(config.schedule, state.step, state.tokens) or (stop_after is not None and state.step >= stop_after):
        return Outcome("done", EXIT_DONE, state.step, f"step {state.step}: the run has come that far already; {origin}")
    check_profile(profile, dims.layout.world, state.step, last_step_asked(config.schedule, stop_after))
    losses = past_losses(run_dir, state.step) if config.checkpoint.keep_best and dims.rank == 0 else {}
    with ExitStack() as opened:
        recorder = opened.enter_context(closing(open_recorder(run_dir, config, state, dims)))
        recorder.event("start", f"{config.name}: {origin}", step=state.step, ranks=dims.layout.world)
        if left_out := state.leave_out(config.skips.data):
            recorder.event("left_out", step=state.step, ranges=left_out)
        meter = Meter(config, device, recorder)
        batches = opened.enter_context(closing(Batches(config, state, dims, host_group)))
        validation = Validation(config, dims, host_group)
        saver = CheckpointSaver(
            run_dir.checkpoints,
            engine,
            config,
            run_dir.tokenizer_path,
            save_group,
            losses,
            recorder.saved,
            watchdog.alive,
        )
        opened.enter_context(closing(saver))
        health = Health(config, engine, saver, host_group, recorder)
        switches = Switches(run_dir, dims.rank)
        warnings = EarlyWarnings(run_dir, config, dims.rank, host_group, recorder)
        profiler = open_profiler(profile, run_dir, engine, meter, recorder, dims)
        stop.begin()

        health.begin(state)
        outcome = batches.missing(state.step)
        while outcome is None:
            watchdog.beat(state.step + 1, "step")
            profiler.begin(state.step + 1)
            meter.begin()
            if state.begin_stage(batches.stage(state)):
                recorder.event("stage", state.stages[-1].in_words(), **state.stages[-1].as_event())
            profiler.at("data")
            micro_batches = next(batches)
            sequences = sum(len(batch.tokens) for batch in micro_batches) * dims.data_world
            tokens_in_step = sequences * state.stages[-1].sequence_length
            assert micro_batches[0].tokens.shape[1] == state.stages[-1].sequence_length
            lr = learning_rate(config, state.step, state.tokens, tokens_in_step)
            skip = state.step + 1 in config.skips.updates
            stats = engine.train_step(micro_batches, lr, before_update=saver.staged, skip=skip)
            profiler.at("data")
            with meter.waiting_for_data():
                failed = batches.failed  # or the next batch is there
            profiler.at("agreement")
            to_stop, to_save = switches.look()
            status = agree(stats, stop.asked or to_stop, to_save, failed, meter.data_seconds, peak_memory_bytes(device))
            profiler.at("recording")
            skipped = skip or not status.finite
            state.advance(sequences, tokens_in_step)
            meter.record(state, status, lr, tokens_in_step, skipped)
            warnings.after_step(state.step, engine.forward_watch.seconds)
            profiler.at("checkpoint")
            saver.poll()

            profiler.at("agreement")
            if (zscore := health.spike(state, status, skipped)) is not None:
                watchdog.beat(state.step, "going back", START_SECONDS)
                state, outcome = health.go_back(run_dir.checkpoints, state, zscore)
                forget_after(losses, state.step)
                batches.place(state)
                outcome = outcome or batches.missing(state.step)
                continue
            outcome = health.unsound(state, status)
            if outcome is not None:
                break  # and what came of it is not saved
            outcome = ending(config, state, status, stop_after) or (
                batches.missing(state.step) if status.failed else None
            )
            if outcome is not None or status.save or due(config.checkpoint.every_steps, state.step):
                watchdog.beat(state.step, "saving")
                profiler.at("checkpoint")
                saver.start(state)
                switches.saving()
            hurried = outcome is not None and outcome.status != "done"
            if not hurried and due(config.evaluation.every_steps, state.step):
                profiler.at("validation")
                began, beat = time.perf_counter(), partial(watchdog.beat, state.step, "validation")
                by_source = validation.scores(engine, beat)
                losses[state.step] = mean_loss(score.loss for score in by_source.values())
                recorder.validation(state.step, state.tokens, by_source, time.perf_counter() - began)
        profiler.end()
        if outcome.status != "failed":  # else that is what is told, whatever becomes of the last save
            watchdog.beat(outcome.step, "saving")
            saver.wait()
        recorder.event("end", step=outcome.step, status=outcome.status, message=outcome.message)
        return outcome


def ending(config: RunConfig, state: TrainState, status: Status, stop_after: int | None) -> Outcome | None:
    """How the run ends after this step, or None if it goes on. The same on every rank, since the status is."""
    if finished(config.schedule, state.step, state.tokens):
        return Outcome("done", EXIT_DONE, state.step, f"step {state.step}: the run is complete")
    if stop_after is not None and state.step >= stop_after:
        return Outcome("done", EXIT_DONE, state.step, f"step {state.step}: stopped early as --stop-after asked")
    if status.stop:
        return Outcome("stopped", EXIT_STOPPED, state.step, f"step {state.step}: stopped on request, checkpointed")
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


def open_recorder(run_dir: RunDir, config: RunConfig, state: TrainState, dims: ParallelDims) -> Recorder:
    """Rank 0 records, the others are silent."""
    if dims.rank != 0:
        return SilentRecorder()
    return RunRecorder(run_dir, state.step, config.schedule.total_steps, config.schedule.total_tokens)
