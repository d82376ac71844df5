"""The learning rate of each step and the end of a run, as pure functions of the config."""

import math

from pretrain.config import RunConfig, ScheduleConfig


def due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


def progress(schedule: ScheduleConfig, step: int, tokens: int) -> int:
    """How far the run is, in the schedule's unit."""
    return tokens if schedule.counts_tokens else step


def finished(schedule: ScheduleConfig, step: int, tokens: int) -> bool:
    """Whether the run has reached its length after `step` steps and `tokens` tokens."""
    return progress(schedule, step, tokens) >= schedule.total


def last_step_asked(schedule: ScheduleConfig, stop_after: int | None) -> int | None:
    """The last step that an attempt is to make; None where only tokens are counted."""
    return min((step for step in (schedule.total_steps, stop_after) if step is not None), default=None)


def learning_rate(config: RunConfig, step: int, tokens: int, tokens_in_step: int) -> float:
    """The learning rate of the step that begins after `step` steps and `tokens` tokens and reads `tokens_in_step`.

    Warm-up rises linearly and already moves in its first step: it counts the step being made, (progress + one step).
    cosine: Loshchilov & Hutter 2017, equation 5, without restarts; wsd: Hu et al. 2024 (MiniCPM), linear decay.
    """
    schedule, peak = config.schedule, config.optimizer.lr
    one_step = tokens_in_step if schedule.counts_tokens else 1
    done = progress(schedule, step, tokens)
    if done < schedule.warmup:
        return peak * min(1.0, (done + one_step) / schedule.warmup)
    start = schedule.total - schedule.decay if schedule.decay is not None else schedule.warmup
    share = min(1.0, max(0.0, (done - start) / max(1, schedule.total - start)))
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * SHAPES[schedule.name](share))


# From 1 at the start of the decay to 0 at its end; a test asserts that the names are those of ScheduleConfig.
SHAPES = {
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "linear": lambda share: 1 - share,
    "wsd": lambda share: 1 - share,
    "constant": lambda share: 1.0,
}
