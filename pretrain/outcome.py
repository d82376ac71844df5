"""How an attempt at a run ended, as ranks leave it for the launcher. Ranks exit 0; this carries the exit code."""

import errno
import traceback
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


MISTAKEN_PATHS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
OURS = {"launch", "pretrain", "model", "data_pipeline"}


def exit_code_of(error: BaseException) -> int:
    """2 where the user's input is at fault and a retry would not help, 1 for everything else.

    A wrong path is the user's wherever it is met; a ValueError only if our own code raised it, for one from inside a
    library is a fault of ours.
    """
    read_only = isinstance(error, OSError) and error.errno == errno.EROFS
    ours = isinstance(error, ValueError) and _raised_in(error) in OURS
    mistake = isinstance(error, MISTAKEN_PATHS) or read_only or ours
    return EXIT_WRONG_INPUT if mistake else EXIT_FAILED


def _raised_in(error: BaseException) -> str:
    """The top-level package of the code that raised."""
    frames = list(traceback.walk_tb(error.__traceback__))
    module = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    spec = frames[-1][0].f_globals.get("__spec__") if module == "__main__" else None
    return (spec.name if spec else module).split(".")[0]
