"""Work that several ranks share and that ends in one answer, or in one error, whichever rank met it.

A user's mistake is an answer, too: every rank brings what it has or its error to a gathering, none leaves alone, and
the process that started them raises the error as if it had met it itself.
"""

import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist

from pretrain.device import detect, init_process_group, new_cpu_group
from pretrain.outcome import MISTAKEN_PATHS
from pretrain.parallel_dims import gathered
from pretrain.run_dir import read_json, write_json
from pretrain.stop import launcher, when_launcher_dies

T = TypeVar("T")
Start = Callable[[str, list[str], int], None]
"""Starts `python -m MODULE ARGUMENTS` on so many local ranks and waits for them; see `launch.ranks.run_ranks`."""
_ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "OSError": OSError}


class Ranks:
    """The ranks that share a piece of work: this process alone, or those of a group."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)

    def together(self, act: Callable[[], T]) -> T:
        """What `act` returns on this rank, once it has returned on all.

        Raises on every rank the ValueError or OSError that it raises on one (on the first one, if on several).
        """
        value: T | None = None
        failure: ValueError | OSError | None = None
        try:
            value = act()
        except (ValueError, OSError) as error:
            if self._group is None:
                raise
            # A wrong path is a mistake: trying again would not mend it.
            mistake = isinstance(error, (ValueError, *MISTAKEN_PATHS))
            failure = ValueError(str(error)) if mistake else OSError(str(error))
        for found in self.gather(failure):
            if found is not None:
                raise found
        return cast(T, value)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank."""
        return gathered(value, self._group)


def run_on_ranks(module: str, job: Any, nproc: int, start: Start) -> Any:
    """What `rank_main` answers in `module` on `nproc` local ranks to a job of plain JSON values.

    Raises the ValueError or OSError that they met.
    """
    with tempfile.TemporaryDirectory(prefix="steppe-eval-") as scratch:
        job_path, answer_path = Path(scratch) / "job.json", Path(scratch) / "answer.json"
        write_json(job_path, job)
        start(module, [str(job_path), str(answer_path)], nproc)
        answer = read_json(answer_path)
    if "error" in answer:
        raise _ERRORS[answer["kind"]](answer["error"])
    return answer["result"]


def rank_main(work: Callable[[Any, Ranks], Any]) -> None:
    """The `main` of a module for `run_on_ranks`: one of several ranks, `python -m MODULE JOB.json ANSWER.json`.

    work: from a job to JSON values, of which the first rank's are the answer. An error must be raised by all ranks or
    none, which `Ranks.together` sees to.

    A rank ends when its launcher dies: nobody waits for the answer then, and the lock on what it writes went with it.
    """
    when_launcher_dies(signal.SIGKILL, launcher())
    init_process_group(detect())
    ranks = Ranks(new_cpu_group())
    try:
        answer = {"result": work(read_json(Path(sys.argv[1])), ranks)}
    except (ValueError, OSError) as error:
        answer = {"error": str(error), "kind": "ValueError" if isinstance(error, ValueError) else "OSError"}
    if ranks.rank == 0:
        write_json(Path(sys.argv[2]), answer)
    dist.barrier()
    dist.destroy_process_group()
