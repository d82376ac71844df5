"""What a run makes of a step that went wrong. Every rank judges by the same numbers, so all decide alike.

A loss or gradient that is not finite is known before the update, which the engine then leaves out on every rank. A
spike is known only after it, when the masters have moved: so the remedy is to go back to a checkpoint and to leave out
the data since (PaLM, section 5.1). Both are on record, and `skips` repeats them.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from pretrain.checkpoint.load import load_newest
from pretrain.config import RunConfig
from pretrain.engine import Engine, Status
from pretrain.outcome import EXIT_FAILED, Outcome
from pretrain.schedule import batch_size_at, due
from pretrain.state import TrainState

# Of a normal distribution: its standard deviation over its median absolute deviation.
SIGMA_OVER_MAD = 1.4826
# Losses vary by more than this share of their median: so that a window of equal ones makes no spike of the next.
LEAST_DEVIATION = 1e-3


def robust_zscore(loss: float, losses: Sequence[float]) -> float:
    """How many standard deviations `loss` lies above the median of `losses`, the deviation taken from the median
    absolute one (Iglewicz & Hoaglin 1993), which a few outliers do not move."""
    median = statistics.median(losses)
    deviation = SIGMA_OVER_MAD * statistics.median(abs(other - median) for other in losses)
    return (loss - median) / max(deviation, LEAST_DEVIATION * abs(median), 1e-12)


@dataclass(frozen=True)
class Rewound:
    """A run that has gone back: the state to go on from, and from where it came."""

    state: TrainState
    checkpoint: Path
    spiked_step: int
    left_out: tuple[int, int]


class Health:
    """Judges every step of an attempt."""

    def __init__(self, config: RunConfig, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self._skipped_in_a_row = 0
        self._rewinds: dict[int, int] = {}  # by the step that was gone back to

    def zscore(self, state: TrainState, status: Status) -> float | None:
        """Of a loss that is a spike, else None; takes it into the window if it is none.

        Nothing is a spike before half a window is there to compare with.
        """
        health = self.config.health
        if not health.spike_zscore or not status.finite:
            return None
        if len(state.losses) >= health.spike_window // 2:
            found = robust_zscore(status.loss, state.losses)
            if found > health.spike_zscore:
                return found
        state.losses = [*state.losses, status.loss][-health.spike_window :]
        return None

    def go_back(self, checkpoints: Path, state: TrainState, group: dist.ProcessGroup | None) -> Rewound | Outcome:
        """Load the newest checkpoint, and leave out the data since it and that of `spike_skip_steps` more steps.

        Returns an outcome if it has been gone back to too often. Collective.
        """
        restored = load_newest(checkpoints, self.engine, group)
        assert restored.checkpoint is not None  # a run that looks for spikes saves before its first step
        back, health = restored.state, self.config.health
        self._rewinds[back.step] = self._rewinds.get(back.step, 0) + 1
        if self._rewinds[back.step] > health.max_rewinds:
            return Outcome(
                "failed",
                EXIT_FAILED,
                back.step,
                f"step {state.step}: the loss has spiked {self._rewinds[back.step]} times since the checkpoint of step "
                f"{back.step} (health.max_rewinds={health.max_rewinds}): resume with a lower optimizer.lr",
            )
        left_out = (back.position, state.position + health.spike_skip_steps * batch_size_at(self.config, state.tokens))
        back.leave_out([left_out])
        return Rewound(back, restored.checkpoint, state.step, left_out)

    def unsound(self, state: TrainState, status: Status) -> Outcome | None:
        """An outcome if this step shows that training must not go on from here. Collective."""
        return self._skips_too_much(state, status) or self._replicas_differ(state)

    def _skips_too_much(self, state: TrainState, status: Status) -> Outcome | None:
        if status.finite or self.config.precision == "fp16":  # which looks for its loss scale so
            self._skipped_in_a_row = 0
            return None
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row <= self.config.health.max_skipped_steps:
            return None
        return Outcome(
            "failed",
            EXIT_FAILED,
            state.step,
            f"step {state.step}: loss {status.loss} with gradient norm {status.grad_norm}, for the "
            f"{self._skipped_in_a_row}. time in a row not a number to train on (health.max_skipped_steps="
            f"{self.config.health.max_skipped_steps}); resume from the last checkpoint with a lower optimizer.lr",
        )

    def _replicas_differ(self, state: TrainState) -> Outcome | None:
        if not due(self.config.health.replica_check_every_steps, state.step):
            return None
        found = self.engine.differing_replicas()
        if not found:
            return None
        name, ranks = found[0]
        more = f" and {len(found) - 1} other parameters" if len(found) > 1 else ""
        return Outcome(
            "failed",
            EXIT_FAILED,
            state.step,
            f"step {state.step}: rank {', '.join(map(str, ranks))} has other bits in {name}{more} than the ranks that "
            "hold the same: memory or a device is at fault there; resume from the last checkpoint on other nodes",
        )
