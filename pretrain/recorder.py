"""What a run says about itself, from one rank: events.jsonl at full precision, TensorBoard, and lines for a person."""

from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from pretrain.checkpoint.save import Saved
from pretrain.evaluation.score import Score
from pretrain.progress import StepProgress, validation_in_words
from pretrain.run_dir import RunDir, event_line, open_events

# Scalars of a step event that TensorBoard shows, with units in their names.
STEP_SCALARS = {
    "loss": "train/loss_nats_per_token",
    "grad_norm": "train/grad_norm",
    "lr": "train/learning_rate",
    "tokens": "train/tokens",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "step_seconds": "speed/step_seconds",
    "data_seconds": "speed/data_seconds",
    "memory_bytes": "memory/peak_bytes_per_rank",
}

# Measures of a held-out source that TensorBoard shows.
VALIDATION_SCALARS = {
    "loss": "loss_nats_per_token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits_per_byte",
}

# Steps from one record of every expert's load to the next: it can be thousands of numbers.
EXPERT_LOAD_EVERY = 100


class Recorder(Protocol):
    """What the loop tells."""

    def step(self, **event: Any) -> None:
        """One optimizer step."""

    def validation(self, step: int, tokens: int, by_source: dict[str, Score], seconds: float) -> None:
        """Scores on held-out sources, after so many tokens of training."""

    def saved(self, saved: Saved) -> None:
        """A checkpoint that is committed, or has failed."""

    def rewound(self, step: int, to_step: int, checkpoint: Path, left_out: tuple[int, int], zscore: float) -> None:
        """The loss of a step was a spike, so the run has gone back, and leaves out a range of samples."""

    def event(self, kind: str, say: str = "", **event: Any) -> None:
        """Anything else; `say` is the line for a person."""

    def close(self) -> None:
        """Flush."""


class SilentRecorder:
    """Of the ranks that do not log."""

    def step(self, **event: Any) -> None: ...

    def validation(self, step: int, tokens: int, by_source: dict[str, Score], seconds: float) -> None: ...

    def saved(self, saved: Saved) -> None: ...

    def rewound(self, step: int, to_step: int, checkpoint: Path, left_out: tuple[int, int], zscore: float) -> None: ...

    def event(self, kind: str, say: str = "", **event: Any) -> None: ...

    def close(self) -> None: ...


class RunRecorder:
    """Writes into a run's folder. A resumed run appends: where a step was made twice, the later line holds."""

    def __init__(self, run_dir: RunDir, first_step: int, total_steps: int | None, total_tokens: int | None) -> None:
        self.run_dir, self.events = run_dir, open_events(run_dir)
        self.tensorboard = SummaryWriter(str(run_dir.tensorboard), purge_step=first_step + 1)
        self.first = True  # of this attempt's steps
        self.progress = StepProgress(first_step, total_steps, total_tokens)

    def step(self, expert_load: dict[int, list[int]] | None = None, **event: Any) -> None:
        step = event["step"]
        if expert_load:
            busiest = {layer: max(pairs) * len(pairs) / sum(pairs) for layer, pairs in expert_load.items()}
            event["expert_load_max_over_mean"] = busiest
            for layer, ratio in busiest.items():
                self.tensorboard.add_scalar(f"experts/layer_{layer}_max_over_mean", ratio, step)
            if step % EXPERT_LOAD_EVERY == 0 or self.first:
                self._expert_load(expert_load, step)
        self.first = False
        self._write("step", event)
        for key, name in STEP_SCALARS.items():
            self.tensorboard.add_scalar(name, event[key], step)
        self.progress.step(event)

    def validation(self, step: int, tokens: int, by_source: dict[str, Score], seconds: float) -> None:
        measured = {
            name: {key: score.measure(key) for key in VALIDATION_SCALARS}
            | {"tokens": score.tokens, "bytes": score.bytes, "documents": score.documents}
            for name, score in by_source.items()
        }
        self._write("evaluation", {"step": step, "tokens": tokens, "by_source": measured, "seconds": seconds})
        for source, measures in measured.items():
            for key, name in VALIDATION_SCALARS.items():
                self.tensorboard.add_scalar(f"validation/{source}_{name}", measures[key], step)
        self.progress.say(f"step {step}: validation {validation_in_words(measured)}")

    def saved(self, saved: Saved) -> None:
        times = {"stall_seconds": saved.stall_seconds, "seconds": saved.seconds}
        if saved.failure is not None:
            say = f"{saved.failure}; the checkpoints before are as they were"
            self.event("checkpoint_failed", say, step=saved.step, message=saved.failure, **times)
            return
        note = f"; {saved.note}" if saved.note else ""
        say = f"step {saved.step}: saved {saved.path}{note}"
        self.event("checkpoint", say, step=saved.step, path=str(saved.path), size_bytes=saved.size_bytes, **times)
        for key, value in times.items():
            self.tensorboard.add_scalar(f"checkpoint/{key}", value, saved.step)

    def rewound(self, step: int, to_step: int, checkpoint: Path, left_out: tuple[int, int], zscore: float) -> None:
        say = (
            f"step {step}: the loss has spiked ({zscore:.1f} robust standard deviations); goes back to {checkpoint} "
            f"and leaves out samples {left_out[0]} to {left_out[1] - 1}"
        )
        where = {"step": step, "to_step": to_step, "checkpoint": str(checkpoint), "left_out": list(left_out)}
        self.event("rewind", say, **where, zscore=zscore)
        self.tensorboard.close()
        self.tensorboard = SummaryWriter(str(self.run_dir.tensorboard), purge_step=to_step + 1)

    def event(self, kind: str, say: str = "", **event: Any) -> None:
        self._write(kind, event)
        if say:
            self.progress.say(say)

    def close(self) -> None:
        self.progress.close()
        self.tensorboard.close()
        self.events.close()

    def _expert_load(self, expert_load: dict[int, list[int]], step: int) -> None:
        """Token-expert pairs of each expert: as an event, and as histograms whose bars are the experts of a layer."""
        self._write("expert_load", {"step": step, "pairs": expert_load})
        for layer, pairs in expert_load.items():
            ids = range(len(pairs))
            self.tensorboard.add_histogram_raw(
                f"experts/layer_{layer}_pairs_by_expert",
                min=0,
                max=len(pairs) - 1,
                num=sum(pairs),
                sum=sum(i * n for i, n in zip(ids, pairs, strict=True)),
                sum_squares=sum(i * i * n for i, n in zip(ids, pairs, strict=True)),
                bucket_limits=[i + 0.5 for i in ids],
                bucket_counts=pairs,
                global_step=step,
            )

    def _write(self, kind: str, event: dict[str, Any]) -> None:
        self.events.write(event_line(kind, event))
