"""How an attempt at a run ended, as ranks leave it for the launcher. Ranks exit 0; this carries the exit code."""

from dataclasses import asdict, dataclass
from typing import Literal

from pretrain.run_dir import RunDir, read_json, write_json

EXIT_DONE, EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_STOPPED = 0, 1, 2, 75


@dataclass(frozen=True)
class Outcome:
    """status: done, stopped (on request; a checkpoint is there to resume from) or failed."""

    status: Literal["done", "stopped", "failed"]
    exit_code: int
    step: int
    message: str

    def write(self, run_dir: RunDir) -> None:
        write_json(run_dir.outcome_path, asdict(self))

    @classmethod
    def read(cls, run_dir: RunDir) -> "Outcome":
        return cls(**read_json(run_dir.outcome_path))


def exit_code_of(error: BaseException) -> int:
    """2 where the user's input is at fault and a retry would not help, 1 for everything else."""
    return EXIT_WRONG_INPUT if isinstance(error, ValueError | FileNotFoundError | FileExistsError) else EXIT_FAILED
