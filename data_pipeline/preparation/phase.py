"""What a preparation goes through: phases one after another, each parted into tasks that any worker may do."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from data_pipeline.manifest import MANIFEST_NAME
from data_pipeline.preparation.plan import Plan
from data_pipeline.preparation.work_folder import WorkFolder
from data_pipeline.shards import token_dtype
from data_pipeline.tokenizer import Tokenizer

OnBytes = Callable[[int], None]


class Job:
    """A plan, the folder that it is worked on in, and the tokenizer as this process finds it."""

    def __init__(self, out: Path, plan: Plan, tokenizer_path: str) -> None:
        self.out = out
        self.work = WorkFolder(out)
        self.plan = plan
        self.tokenizer_path = tokenizer_path
        self.is_written = (out / MANIFEST_NAME).exists()
        """Whether the folder was finished before, and is to be packed only."""

    @classmethod
    def opened(cls, out: Path, tokenizer_path: str) -> Self:
        """The job that was begun in `out`."""
        return cls(out, WorkFolder(out).read_plan(), tokenizer_path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.tokenizer_path)

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.tokenizer.vocab_size)


class Phase(ABC):
    """One phase. It begins when every task of the phase before is done."""

    name: ClassVar[str]
    """A word for people, and of the tasks' names in the work folder."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @abstractmethod
    def sizes(self) -> list[int | None]:
        """Of each task, in bytes, as `on_bytes` will be told of it; None where nobody knows."""

    @abstractmethod
    def do(self, task: int, threads: int, on_bytes: OnBytes) -> dict[str, Any]:
        """Do a task, from its beginning and whatever an attempt that died has left behind.

        What it writes is on the disk when it returns. The result is of JSON, and the same whoever does it.

        Raises:
            ValueError: the corpus is damaged, or the like: another attempt would end the same way.
            OSError: the disk is full, a store does not answer: another attempt may succeed.
        """

    def worker_bytes(self) -> int:
        """Memory that a worker of this phase takes, where that is so much that it bounds their number; else 0."""
        return 0

    def task_name(self, task: int) -> str:
        return f"{self.name}-{task:06d}"

    def results(self) -> list[dict[str, Any]]:
        """What the tasks have left, once all are done."""
        return [self.job.work.result(self.task_name(task)) for task in range(len(self.sizes()))]
