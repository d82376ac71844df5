"""Faults in the ranks of a run, without a hook in the product.

A Python made by `tests/slurm/faulty.py` imports this file when it starts. It waits for the modules that only ranks
import, and has the faults in that Python's own folder, `faults.json`, strike in them. The file is read again at each
step, so that a test can change its mind.
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

LARGE_PRIME = 7919  # which divides no vocabulary's size: different targets stay different


class Faults:
    """What befalls this rank, step by step."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.state: Any = None  # the TrainState that was made or moved last: the run's
        self.begun = 0.0  # the last step

    def all(self) -> list[dict[str, Any]]:
        """What the test has written last."""
        return json.loads((self.folder / "faults.json").read_text())

    def due(self, step: int, saving: bool = False) -> list[dict[str, Any]]:
        """The faults of this rank at this step, or at its save. What strikes once is marked as done."""
        mine = (None, int(os.environ["RANK"]))
        now = [
            fault
            for fault in self.all()
            if fault["rank"] in mine
            and fault["first"] <= step <= fault["last"]
            and (fault["what"] == "hold save") == saving
        ]
        return [fault for fault in now if not fault["once"] or self.marked(fault)]

    def marked(self, fault: dict[str, Any]) -> bool:
        """Mark a fault as done; whether it was not yet."""
        try:
            (self.folder / "struck_{what}_{first}".format(**fault)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def wait_for_release(self, fault: dict[str, Any]) -> None:
        """Wait until the test has taken a fault away."""
        while fault in self.all():
            time.sleep(0.05)

    @contextmanager
    def striking(self, engine: Any, batches: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """Around a step: yields the batches that it gets."""
        step = self.state.step + 1
        with ExitStack() as undo:
            for fault in self.due(step):
                what = fault["what"]
                if what == "slow":
                    time.sleep(max(0.0, self.begun + fault["seconds"] - time.monotonic()))
                elif what == "hold":
                    self.wait_for_release(fault)
                elif what == "hang":
                    while True:
                        time.sleep(3600)
                elif what == "garbage":
                    if self.position(engine, batches) in range(*fault["positions"]):
                        batches = [garbage(batch, engine.config.model.vocab_size) for batch in batches]
                else:
                    weight = next(iter(engine.engine.module.parameters()))
                    undo.enter_context(removed(weight.register_hook(IN_BACKWARD[what])))
            self.begun = time.monotonic()
            yield batches

    def position(self, engine: Any, batches: Sequence[Any]) -> int:
        """Where in the sample order a step begins."""
        from pretrain.data_stages import next_position

        sequences = sum(len(batch.tokens) for batch in batches) * engine.dims.data_world
        return next_position(self.state.position, sequences, self.state.left_out)


@contextmanager
def removed(hook: Any) -> Iterator[None]:
    yield
    hook.remove()


def not_a_number(gradient: Any) -> Any:
    return gradient * float("nan")


def raising(gradient: Any) -> Any:
    raise RuntimeError("a fault of the test's, inside backward")


# Called with the gradient of a weight while backward computes it.
IN_BACKWARD = {"nan": not_a_number, "raise": raising}


def garbage(batch: Any, vocab_size: int) -> Any:
    """The batch with another target in the place of each: mostly rare ones for frequent ones, and so a loss far above
    what the model has come to."""
    targets = batch.targets.copy()
    targets[targets >= 0] = (targets[targets >= 0] * LARGE_PRIME + 1) % vocab_size
    return replace(batch, targets=targets)


def patch_engine(module: Any, faults: Faults) -> None:
    made = module.DeepSpeedEngine.train_step

    def train_step(self: Any, batches: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        with faults.striking(self, batches) as given:
            return made(self, given, *args, **kwargs)

    module.DeepSpeedEngine.train_step = train_step


def patch_state(module: Any, faults: Faults) -> None:
    made, moved = module.TrainState.__init__, module.TrainState.advance

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        faults.state = self

    def advance(self: Any, *args: Any, **kwargs: Any) -> None:
        moved(self, *args, **kwargs)
        faults.state = self

    module.TrainState.__init__, module.TrainState.advance = init, advance


def patch_save(module: Any, faults: Faults) -> None:
    made = module.write_rank_file

    def write_rank_file(path: Path, *args: Any, **kwargs: Any) -> Any:
        step = int(path.parent.name.removesuffix(".tmp").removeprefix("step_"))
        for fault in faults.due(step, saving=True):
            faults.wait_for_release(fault)
        return made(path, *args, **kwargs)

    module.write_rank_file = write_rank_file


PATCHES: dict[str, Callable[[Any, Faults], None]] = {
    "pretrain.engine_deepspeed": patch_engine,
    "pretrain.state": patch_state,
    "pretrain.checkpoint.save": patch_save,
}


class PatchingLoader(importlib.abc.Loader):
    """Loads a module as it is, then patches it."""

    def __init__(self, loader: Any, faults: Faults) -> None:
        self.loader, self.faults = loader, faults

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        PATCHES[module.__name__](module, self.faults)


class PatchingFinder(importlib.abc.MetaPathFinder):
    """Finds the modules to be patched where anyone would."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in PATCHES:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None:
            spec.loader = PatchingLoader(spec.loader, self.faults)
        return spec


sys.meta_path.insert(0, PatchingFinder(Faults(sys.prefix)))
