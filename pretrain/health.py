"""What a run makes of a step that went wrong. Every rank judges by the same numbers, so all decide alike.

A loss or gradient that is not finite is known before the update, which the engine then leaves out on every rank. A
spike is known only after it, when the masters have moved: so the remedy is to go back to a checkpoint and to leave out
the data since (PaLM, section 5.1). Both are on record, and `skips` repeats them.
"""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from pretrain.checkpoint.load import load_newest
from pretrain.checkpoint.save import CheckpointSaver
from pretrain.config import RunConfig
from pretrain.engine import Engine, Status
from pretrain.outcome import EXIT_FAILED, Outcome
from pretrain.parallel_dims import gathered
from pretrain.recorder import Recorder
from pretrain.schedule import due
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


class Health:
    """Judges every step of an attempt. What it goes by is in the state, so that a resumed run judges alike.

    group: of all ranks, on the host; None on a single one.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        saver: CheckpointSaver,
        group: dist.ProcessGroup | None,
        recorder: Recorder,
    ) -> None:
        self.config, self.engine, self.saver, self.group, self.recorder = config, engine, saver, group, recorder
        self._rewinds: dict[int, int] = {}  # by the step that was gone back to

    def begin(self, state: TrainState) -> None:
        """Before the first step: a run that looks for spikes has something to go back to. Collective.

        Raises CheckpointError on every rank if that cannot be written.
        """
        if self.config.health.spike_zscore and state.step == 0:
            self.saver.start(state)
            self.saver.wait()

    def spike(self, state: TrainState, status: Status, skipped: bool) -> float | None:
        """The robust z-score of a loss that is a spike, else None; takes it into the window if it is none.

        A step that was skipped is none: it changed nothing. Nor is one before half a window is there to compare with.
        """
        health = self.config.health
        if not health.spike_zscore or skipped:
            return None
        if len(state.losses) >= health.spike_window // 2:
            zscore = robust_zscore(status.loss, state.losses)
            if zscore > health.spike_zscore:
                return zscore
        state.losses = [*state.losses, status.loss][-health.spike_window :]
        return None

    def go_back(self, checkpoints: Path, state: TrainState, zscore: float) -> tuple[TrainState, Outcome | None]:
        """Load the newest checkpoint, and leave out the data since it and that of `spike_skip_steps` more steps.

        Returns the state to go on from, and an outcome if it has been gone back to too often. Collective.
        """
        self.saver.close()
        restored = load_newest(checkpoints, self.engine, self.group)
        assert restored.checkpoint is not None, "see begin"
        back, health = restored.state, self.config.health
        end = state.position + health.spike_skip_steps * state.stages[-1].batch_size(state.tokens)
        left_out = (back.position, end)
        back.leave_out([left_out, *self.config.skips.data])
        self._rewinds[back.step] = self._rewinds.get(back.step, 0) + 1
        if self._rewinds[back.step] > health.max_rewinds:
            return back, Outcome(
                "failed",
                EXIT_FAILED,
                back.step,
                f"step {state.step}: the loss has spiked {self._rewinds[back.step]} times since the checkpoint of step "
                f"{back.step} (health.max_rewinds={health.max_rewinds}): resume with a lower optimizer.lr",
            )
        self.recorder.rewound(state.step, back.step, restored.checkpoint, left_out, zscore)
        return back, None

    def unsound(self, state: TrainState, status: Status) -> Outcome | None:
        """An outcome if this step shows that training must not go on from here. Collective."""
        return self._skips_too_much(state, status) or self._replicas_differ(state)

    def _skips_too_much(self, state: TrainState, status: Status) -> Outcome | None:
        if status.finite or self.config.precision == "fp16":  # which looks for its loss scale so
            state.skipped = 0
            return None
        state.skipped += 1
        if state.skipped <= self.config.health.max_skipped_steps:
            return None
        return Outcome(
            "failed",
            EXIT_FAILED,
            state.step,
            f"step {state.step}: loss {status.loss} with gradient norm {status.grad_norm}, for the {state.skipped}. "
            "time in a row not a number to train on (health.max_skipped_steps="
            f"{self.config.health.max_skipped_steps}); resume from the last checkpoint with a lower optimizer.lr",
        )

    def _replicas_differ(self, state: TrainState) -> Outcome | None:
        if not due(self.config.health.replica_check_every_steps, state.step):
            return None
        found = self.engine.differing_replicas()
        if not found:
            return None
        hosts = gathered(os.uname().nodename, self.group)
        name, ranks = found[0]
        where = ", ".join(f"{rank} on {hosts[rank]}" for rank in ranks)
        more = f" and {len(found) - 1} other parameters" if len(found) > 1 else ""
        message = (
            f"step {state.step}: rank {where} has other bits in {name}{more} than the ranks that hold the same: memory "
            "or a device is at fault there; resume from the last checkpoint on other nodes"
        )
        parameters = [name for name, _ in found]
        self.recorder.event("replicas_differ", step=state.step, parameters=parameters, ranks=ranks, message=message)
        return Outcome("failed", EXIT_FAILED, state.step, message)
