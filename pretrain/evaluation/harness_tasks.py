"""Tasks of lm-eval: those it carries and those of a folder, found, loaded and run.

A task is a YAML file, and what it says is done: data is fetched, and what it names by `!function` is code that runs. A
folder of tasks deserves the trust that a program does.
"""

import difflib
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import jinja2
import lm_eval
import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind

from pretrain.environment_variables import added_to_environment
from pretrain.evaluation.harness import SteppeLM

ONE_PROCESS = "DISABLE_MULTIPROC"  # lm-eval's
BOOTSTRAP_ITERATIONS = 100_000  # lm-eval's own, for the standard errors of metrics that are no mean
REPORTED = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
"""Of what lm-eval returns."""


def find_tasks(names: Sequence[str], task_folder: Path | None) -> tuple[TaskManager, list[str]]:
    """What knows the tasks, groups and tags of these names or patterns (`arc_*`), and their names.

    lm-eval's own are looked through only for names that the folder does not have, since that takes ten seconds.
    Raises ValueError for a folder that is not there, and for a name that is unknown.
    """
    if not names:
        raise ValueError("there is no task to run: name some, such as --tasks hellaswag,arc_easy")
    if task_folder is not None:
        if not task_folder.is_dir():
            raise ValueError(f"--task-folder {task_folder} is not a folder: name one with the YAML files of tasks")
        manager = TaskManager(include_path=str(task_folder), include_defaults=False)
        found = _matching(manager, names)
        if all(found.values()) and all(_is_whole(manager, name) for name in _once(found)):
            return manager, _once(found)
    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    found = _matching(manager, names)
    for name, several in found.items():
        if not several:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            meant = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists its own"
            where = "lm-eval" if task_folder is None else f"{task_folder} and lm-eval"
            raise ValueError(f"--tasks {name}: no task, group or tag of {where} is called so; {meant}")
    return manager, _once(found)


def load_tasks(manager: TaskManager, names: Sequence[str], num_fewshot: int | None) -> Mapping[str, Any]:
    """Tasks with their data, as lm-eval's `evaluate` takes them, seeded as its command line does.

    num_fewshot: examples before a question, for tasks that do not insist on none. None leaves that to the task.
    Raises ValueError for a task that is broken, and OSError if its data cannot be had now.
    """
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    with _quiet():
        try:
            loaded = manager.load(list(names))
        except (OSError, ValueError):
            raise
        except Exception as error:  # what a YAML file and the code that it names may raise is anything
            raise ValueError(f"--tasks {','.join(names)}: {type(error).__name__}: {_line(error)}") from error
    for task in loaded["tasks"].values():
        insists = task.get_config("num_fewshot") == 0
        if num_fewshot is not None and not insists:
            task.set_config("num_fewshot", num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return loaded


def run_tasks(
    model: SteppeLM, tasks: Mapping[str, Any], limit: int | None = None, samples: bool = False
) -> dict[str, Any]:
    """What lm-eval finds, as JSON values: `REPORTED`, with `samples` also each document's requests and answers, and
    under "harness" what decides the numbers beside the tasks. On several ranks each has all of it.

    limit: documents of each task, from its first on; for trying out.
    Raises ValueError for a task that is broken, or cannot be asked of the model.
    """
    first = model.ranks.rank == 0
    # For standard errors lm-eval would fork this process, and end the copies by SIGTERM. A copy of a process of many
    # threads may wait for ever, and a rank's takes the signal for a wish. The numbers are the same; the few metrics
    # that are no mean (f1, mcc, perplexity) take as many times longer as there are cores.
    with _quiet(), added_to_environment({ONE_PROCESS: "1"}):
        try:
            found = evaluate(
                model,
                tasks,
                limit=limit,
                log_samples=samples,
                bootstrap_iters=BOOTSTRAP_ITERATIONS if first else 0,  # the first one's are told
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"a task's template is broken: {type(error).__name__}: {_line(error)}") from error
    kept = {name: found[name] for name in (*REPORTED, *(("samples",) if samples else ())) if name in found}
    harness = {
        "lm_eval": lm_eval.__version__,
        "max_length": model.max_length,
        "add_bos_token": model.add_bos_token,
        "start_token": model.start_token,
        "cut_contexts": model.cut_contexts,
        "limit": limit,
    }
    return _plain({**kept, "harness": harness})


def _matching(manager: TaskManager, names: Sequence[str]) -> dict[str, list[str]]:
    return {name: manager.match_tasks([name]) for name in names}


def _is_whole(manager: TaskManager, name: str) -> bool:
    """Whether a name, if it is that of a group, has no member that may be lm-eval's own."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    members = (entry.cfg or {}).get("task") if entry.kind == Kind.GROUP else None
    return not isinstance(members, list) or all(isinstance(each, str) and _is_whole(manager, each) for each in members)


def _once(found: Mapping[str, Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for several in found.values() for name in several))


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, nothing is printed: lm-eval and datasets have bars, and remarks on stdout."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _plain(value: Any) -> Any:
    """As JSON values: numbers of numpy as Python's, what is no number as None, other things as their words."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
