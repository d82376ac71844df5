"""The process of `steppe bench checkpoint`: `python -P -m launch.bench.checkpoint_contender CONFIG.json FOLDER`.

All contenders share it, since they save one engine's state. It answers

    {"act": "save", "name": SAVER, "check": false}   how long it took, for how long training waited, ...
    {"act": "load", "name": LOADER, "check": false}  how long it took

With "check" what was saved is read back and compared bit by bit; what a loader is for is kept.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from launch.bench.checkpoint_formats import BEGIN, LOAD, SAVE, Subject, UnderWay
from launch.bench.contenders import LOADERS, SAVERS
from launch.bench.turns import Answers
from pretrain.config import RunConfig

STEPS = 2  # before the first save: the optimizer has its state then


class Bench:
    """The saves and loads of one subject in one folder."""

    def __init__(self, subject: Subject, root: Path) -> None:
        self.subject, self.root = subject, root
        self.kept: dict[str, tuple[Path, str]] = {}  # of a saver: the folder, and the digest of what is in it
        self._saves = 0

    def save(self, name: str, check: bool) -> dict[str, Any]:
        """Save once, into a folder of its own. With `check`, says whether the same bits are read back."""
        subject = self.subject
        self._saves += 1
        folder = self.root / f"{self._saves:04d}-{name}"
        before = subject.step() if name in BEGIN else 0.0
        subject.fill_buffer()
        digest = self._digest() if check else ""
        os.sync()  # what others have left to write is not to be written now
        if name in SAVE:
            began = time.perf_counter()
            SAVE[name](subject, folder)
            seconds = time.perf_counter() - began
            answer: dict[str, Any] = {"seconds": seconds, "stall_seconds": seconds}
        else:
            answer = beside_training(subject.step, lambda: BEGIN[name](subject, folder), before)
        answer["written_bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if check:
            self.kept[name] = folder, digest
            answer["same"] = self._loads_same(SAVERS[name].loader, *self.kept[name])
        if not check or name not in {loader.saver for loader in LOADERS.values()}:
            shutil.rmtree(folder)
        return answer

    def load(self, name: str, check: bool) -> dict[str, Any]:
        """Load what was kept."""
        folder, digest = self.kept[LOADERS[name].saver]
        if check:
            return {"same": self._loads_same(name, folder, digest)}
        began = time.perf_counter()
        LOAD[name](self.subject, folder)
        return {"seconds": time.perf_counter() - began}

    def _loads_same(self, loader: str, folder: Path, digest: str) -> bool:
        for tensor in self.subject.tensors().values():
            tensor.zero_()
        LOAD[loader](self.subject, folder)
        return self._digest() == digest

    def _digest(self) -> str:
        digest = xxhash.xxh3_64()
        for tensor in self.subject.tensors().values():
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def beside_training(step: Callable[..., float], begin: Callable[[], UnderWay], before: float) -> dict[str, Any]:
    """Save while steps are made, at least one, until it is durable.

    before: seconds of a step before it. With one after it, that says what a step takes undisturbed; what the steps
    beside it took more, less what they waited for staging, is the slowdown.
    """
    began = time.perf_counter()
    under_way = begin()
    waits = [time.perf_counter() - began]

    def staged() -> None:
        asked = time.perf_counter()
        under_way.staged()
        waits.append(time.perf_counter() - asked)

    steps = [step(staged)]
    while not under_way.over():
        steps.append(step())
    seconds = under_way.durable_at() - began
    undisturbed = (before + step()) / 2
    return {
        "seconds": seconds,
        "stall_seconds": sum(waits),
        "steps": len(steps),
        "undisturbed_step_seconds": undisturbed,
        "slowdown_seconds": sum(steps) - sum(waits[1:]) - len(steps) * undisturbed,
    }


def main() -> None:
    """Build, train a little, then answer until nobody asks."""
    answers = Answers()
    config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    subject = Subject(config)
    for _ in range(STEPS):
        subject.step()
    answers.say(
        state_bytes=4 * subject.buffer.numel(),
        tensors=len(subject.tensors()),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    bench = Bench(subject, Path(sys.argv[2]))
    acts = {"save": bench.save, "load": bench.load}
    for question in answers.questions():
        answers.say(**acts[question.pop("act")](**question))
    subject.stager.close()
    subject.thread.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
