"""Running cases on real ranks: one set of processes for all the cases of a test module, since ranks are dear to start.

A module of cases defines `CASES: dict[str, Callable[[], Any]]`, called in order on every rank; rank 0's return values
come back as JSON. A case that raises is reported under its own name, and ends the ranks.
"""

import gc
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = "results.jsonl"


def run_cases(module: str, nproc: int, folder: Path) -> dict[str, Any]:
    """Results of every case by name, from `nproc` gloo ranks."""
    from launch.ranks import RanksError, run_ranks
    from pretrain.environment_variables import added_to_environment

    results = folder / RESULTS
    try:
        with added_to_environment({"PYTHONPATH": str(ROOT)}):
            run_ranks("tests.dist.harness", [module, str(results)], nproc)
    except RanksError:
        errors = "\n".join(path.read_text() for path in folder.glob(f"{RESULTS}.rank*"))
        raise AssertionError(f"{module} failed on {nproc} ranks:\n{errors}") from None
    return finished_cases(folder)


def finished_cases(folder: Path) -> dict[str, Any]:
    """Results of the cases that ran to their end, also where a later one ended the ranks."""
    results = folder / RESULTS
    return dict(json.loads(line) for line in results.read_text().splitlines()) if results.exists() else {}


def main() -> None:
    """One rank."""
    import torch.distributed as dist

    from pretrain.device import detect, init_process_group

    module, results = sys.argv[1], Path(sys.argv[2])
    os.environ["CASE_FOLDER"] = str(results.parent)
    init_process_group(detect())
    name = "import"
    try:
        for name, case in importlib.import_module(module).CASES.items():
            gc.freeze()  # what is there before is not looked at again
            value = case()
            gc.collect()  # an engine holds itself in a circle; the next case should find its memory free
            if dist.get_rank() == 0:
                with open(results, "a") as file:
                    file.write(json.dumps([name, value]) + "\n")
    except BaseException:
        Path(f"{results}.rank{dist.get_rank()}").write_text(f"case {name}\n{traceback.format_exc()}")
        raise
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
