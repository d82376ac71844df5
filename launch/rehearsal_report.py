"""What a rehearsal found, and what it cannot find: no torch here, and nothing is run."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.config import RunConfig
from pretrain.layout import Layout
from pretrain.outcome import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_WRONG_INPUT
from pretrain.resume_policy import changes


@dataclass(frozen=True)
class Stage:
    """What was tried, what came of it, and the exit code that it ends the command with: 0 if it went well."""

    name: str
    exit_code: int
    said: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """What `--rehearse` says of `config`, laid out as `full`, by way of `rehearsed`, laid out as `small`.

    has_data: whether the recipe's own were read. folder: where everything lies, None if it is gone.
    """

    config: RunConfig
    rehearsed: RunConfig
    full: Layout
    small: Layout
    has_data: bool
    stages: list[Stage]
    folder: Path | None

    @property
    def exit_code(self) -> int:
        """2 if the user's input is at fault, 75 if somebody stopped it, 1 if anything else went wrong. A stage that
        fails is the last."""
        code = self.stages[-1].exit_code
        return code if code in (EXIT_DONE, EXIT_WRONG_INPUT, EXIT_STOPPED) else EXIT_FAILED

    @property
    def differences(self) -> list[tuple[str, Any, Any]]:
        """(setting, its value in the run, in the rehearsal) of everything that was changed."""
        degrees = [("ranks", self.full.world, self.small.world), ("data parallelism", self.full.data, self.small.data)]
        changed = [(key, *values) for key, values in changes(self.config, self.rehearsed).items()]
        return [row for row in degrees if row[1] != row[2]] + [
            row for row in changed if not row[0].endswith(".sources")
        ]

    @property
    def not_rehearsed(self) -> list[str]:
        """What only the real run will show, in sentences."""
        found = [
            "Memory and speed. What a rank needs, and whether that fits: steppe plan.",
            "Devices and network: these ranks were processes on a CPU that talk over gloo, not GPUs over NCCL.",
        ]
        if not self.has_data:
            paths = ", ".join(source.path for source in self.config.data.sources)
            found.append(f"Data: {paths} cannot be found from here. Rehearse where they are, too.")
        reduced = [
            f"{name} {getattr(self.small, name)} for {getattr(self.full, name)}"
            for name in ("tensor", "sequence", "expert")
            if getattr(self.small, name) != getattr(self.full, name)
        ]
        if reduced:
            found.append(
                f"Parallelism at full degree with numbers that mean something: trained was {', '.join(reduced)}, since "
                f"together they need more ranks than a rehearsal starts. Their shapes and groups were tried."
            )
        if self.full != self.small and self.config.optimizer.name == "muon":
            found.append("Muon at the full layout, where AdamW made the step: it needs every rank's part of a matrix.")
        if self.rehearsed.precision != self.config.precision:
            found.append(
                f"precision={self.config.precision}: this processor does not compute in it; "
                f"{self.rehearsed.precision} took its place."
            )
        if self.config.parallel.compile:
            found.append("parallel.compile: what is compiled here would be for another device.")
        return found

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "name": self.config.name,
            "ok": self.exit_code == EXIT_DONE,
            "exit_code": self.exit_code,
            "layout": {
                "full": {**asdict(self.full), "data": self.full.data},
                "rehearsed": {**asdict(self.small), "data": self.small.data},
            },
            "stages": [{**asdict(stage), "ok": stage.exit_code == EXIT_DONE} for stage in self.stages],
            "data_rehearsed": self.has_data,
            "differences": [{"setting": key, "full": a, "rehearsed": b} for key, a, b in self.differences],
            "not_rehearsed": self.not_rehearsed,
            "folder": self.folder and str(self.folder),
        }


def in_words(layout: Layout, config: RunConfig) -> str:
    """A layout on one line."""
    degrees = f"data {layout.data} x sequence {layout.sequence} x tensor {layout.tensor}"
    experts = f", experts over {layout.expert}" if config.model.moe is not None else ""
    return f"{degrees}{experts}, ZeRO {config.parallel.zero_stage}, {config.precision}"
