"""`steppe bench start`: how long commands take to say something, a run to its first step, and a resume to load."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.bench.data_tables import below, in_words, print_part, say
from launch.bench.turns import Contender, Guest, Spread, check_cores, ratios, take_turns

if TYPE_CHECKING:
    from pretrain.config import RunConfig

HELP_SECONDS = 0.3
FIRST_STEP_SECONDS = 15.0
LOAD_OF_READ = 1.5
PARTS = ("commands", "first-step", "resume")
# From one mark of a run to the next: the config in its folder, then events.
PHASES = {
    "command": "the command: its imports and checks",
    "ranks": "until the ranks have started, imported torch and joined their process group",
    "engine": "DeepSpeed's import, the engine, initial values",
    "data": "the loader, the device's peak",
    "step": "the first optimizer step",
}


def start(
    recipe: Annotated[str, typer.Option(help="The recipe whose first step is timed.")] = "58m",
    resumed: Annotated[str, typer.Option(help="The recipe whose checkpoint is loaded.")] = "125m",
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of the first step, on this machine.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each; one more before them warms up.")] = 5,
    parts: Annotated[
        list[str], typer.Option("--part", help=f"Of {', '.join(PARTS)}; may be repeated. All by default.")
    ] = [],  # noqa: B006
    folder: Annotated[
        Path, typer.Option("--dir", help="Where to write; a temporary folder is made in it, and removed.")
    ] = Path("."),
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key of both recipes.")
    ] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Seconds from a command to its help, to a run's first step, and of loading a checkpoint beside reading it."""
    result = run(recipe, resumed, ranks, rounds, parts or list(PARTS), folder, overrides)
    if as_json:
        print(json.dumps(result))
    else:
        _print_tables(result)


def run(
    recipe: str, resumed: str, ranks: int, rounds: int, parts: list[str], folder: Path, overrides: list[str]
) -> dict[str, Any]:
    """Measure; returns what `--json` prints.

    Raises ValueError for an unknown part, a folder that is none, a recipe that cannot run so, overrides of none, or
    more ranks than cores; RuntimeError if a command fails.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"--part {part} is none of {', '.join(PARTS)}: name one of those")
    if not folder.is_dir():
        raise ValueError(f"--dir {folder} is no folder: make it first, or name another")
    if overrides and set(parts) == {"commands"}:
        raise ValueError(f"--set {' '.join(overrides)}: commands are of no recipe: leave it out, or add a part")
    # What is wrong with a recipe is said before anything is measured.
    if "first-step" in parts:
        _settings(recipe, ranks, overrides, folder)
        check_cores(ranks)
    if "resume" in parts:
        _resumed(resumed, overrides)
    result: dict[str, Any] = {"rounds": rounds, "cores": len(os.sched_getaffinity(0))}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steppe-bench-", dir=folder))).resolve()
        if "commands" in parts:
            result["commands"] = _commands(scratch, rounds)
        if "first-step" in parts:
            result["first_step"] = _first_steps(recipe, ranks, rounds, overrides, scratch)
        if "resume" in parts:
            result["resume"] = _resumes(resumed, rounds, overrides, scratch)
    return result


# ---------------------------------------------------------------------------------------------- the three parts


def _commands(scratch: Path, rounds: int) -> dict[str, Any]:
    """Commands that a person waits for, on a login node."""
    from launch.run_folder import recipe_path
    from pretrain.recipe import dump_config, load_config
    from pretrain.run_dir import RunDir

    run = scratch / "run"
    run.mkdir()
    dump_config(load_config(recipe_path("58m")), RunDir(run).config_path)
    lines = {
        "help": ["--help"],
        "status": ["status", str(run)],
        "plan": ["plan", "7b", "--nodes", "1", "--gpus-per-node", "8", "--gpu", "h100-80g"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    for number in range(rounds + 1):
        for name, words in lines.items():
            say(f"round {number}/{rounds}: steppe {' '.join(words[:1])}")
            began = time.perf_counter()
            _steppe(words)
            seconds[name].append(time.perf_counter() - began)
    spreads = {name: Spread.of(values[1:]) for name, values in seconds.items()}
    return {
        "what": {name: f"steppe {' '.join(words)}" for name, words in lines.items()},
        "seconds": {name: spread.as_dict() for name, spread in spreads.items()},
        "targets": [below("seconds of steppe --help", HELP_SECONDS, spreads["help"])],
    }


def _first_steps(recipe: str, ranks: int, rounds: int, overrides: list[str], scratch: Path) -> dict[str, Any]:
    data = _data(scratch)
    phases = []
    for number in range(rounds + 1):
        say(f"round {number}/{rounds}: the first step of {recipe} on {ranks} ranks")
        phases.append(_first_step(recipe, ranks, overrides, data, scratch / f"run_{number}"))
    kept = phases[1:]
    total = Spread.of([sum(round_.values()) for round_ in kept])
    return {
        "recipe": recipe,
        "ranks": ranks,
        "seconds": total.as_dict(),
        "phases": {name: Spread.of([round_[name] for round_ in kept]).as_dict() for name in PHASES},
        "by_round": kept,
        "targets": [below(f"seconds to the first step on {ranks} ranks", FIRST_STEP_SECONDS, total)],
    }


def _first_step(recipe: str, ranks: int, overrides: list[str], data: Path, folder: Path) -> dict[str, float]:
    """The phases of a run of one step, in seconds."""
    from pretrain.run_dir import RunDir, read_events

    words = [word for setting in _settings(recipe, ranks, overrides, data) for word in ("--set", setting)]
    began = time.time()
    _steppe(["train", recipe, "--nproc", str(ranks), "--run-dir", str(folder), "--stop-after", "1", *words])
    run = RunDir(folder)
    events = {event["type"]: event["time"] for event in read_events(run.events_path)}
    marks = [
        began,
        run.config_path.stat().st_mtime,
        *(events[kind] for kind in ("environment", "start", "stage", "step")),
    ]
    shutil.rmtree(folder)  # it holds a checkpoint
    return {name: end - start for name, start, end in zip(PHASES, marks[:-1], marks[1:], strict=True)}


def _settings(recipe: str, ranks: int, overrides: list[str], data: Path) -> list[str]:
    """What to set of a recipe for the shortest step that uses every rank: one micro-batch each.

    Raises ValueError if there is no such recipe, or none that runs so.
    """
    from launch.run_folder import recipe_path
    from pretrain.layout import check_layout
    from pretrain.recipe import load_config

    source = f"data.sources=[{{name: text, path: {json.dumps(str(data))}}}]"
    settings = [source, "evaluation.every_steps=0", *overrides]
    config = load_config(recipe_path(recipe), settings)
    batch = config.batch.micro_batch_size * max(1, ranks // config.parallel.ranks_per_sample)
    settings += [f"batch.global_batch_size={batch}", "batch.ramp=[]"]
    check_layout(load_config(recipe_path(recipe), settings), ranks)
    return settings


def _resumes(recipe: str, rounds: int, overrides: list[str], scratch: Path) -> dict[str, Any]:
    path = scratch / "config.json"
    path.write_text(_resumed(recipe, overrides).model_dump_json(), encoding="utf-8")
    say(f"building {recipe} and saving it")
    with Contender(
        "resume", "launch.bench.start_contender", [str(path), str(scratch)], len(os.sched_getaffinity(0))
    ) as host:
        built = host.built()
        guests = [Guest("read", host), Guest("load", host)]
        take_turns(guests, 1, {}, lambda name, _: say(f"warming up: {name}"))
        answers = take_turns(guests, rounds, {}, lambda name, number: say(f"round {number + 1}/{rounds}: {name}"))
    seconds = {name: [answer["seconds"] for answer in turns] for name, turns in answers.items()}
    ratio = ratios(seconds["load"], seconds["read"])
    return {
        "recipe": recipe,
        **built,
        "seconds": {name: Spread.of(values).as_dict() for name, values in seconds.items()},
        "load_of_read": ratio.as_dict(),
        "by_round": seconds,
        "targets": [below("seconds of loading / of reading and hashing", LOAD_OF_READ, ratio)],
    }


def _resumed(recipe: str, overrides: list[str]) -> "RunConfig":
    """The config of what is loaded, on one rank. Raises ValueError if there is no such recipe, or none that runs so."""
    from launch.run_folder import recipe_path
    from pretrain.layout import check_layout
    from pretrain.recipe import load_config

    config = load_config(recipe_path(recipe), ["data={sources: [{name: random, path: none}]}", *overrides])
    single = config.batch.model_copy(update={"global_batch_size": config.batch.micro_batch_size, "ramp": ()})
    config = config.model_copy(update={"batch": single})
    check_layout(config, 1)
    return config


# ----------------------------------------------------------------------------------------------------- helpers


def _data(scratch: Path) -> Path:
    """A small data folder of text that every machine with Python has."""
    from launch.bench.data_text import read_texts, train, write_text

    say("preparing a little data")
    what, texts = read_texts([])
    texts = texts[:200]
    write_text(what, texts, scratch / "text", files=1, least_bytes=1)
    tokenizer = scratch / "tokenizer.model"
    train(texts, 1000, tokenizer)
    out = scratch / "data"
    _steppe(["data", "prepare", "--input", str(scratch / "text"), "--tokenizer", str(tokenizer), "--out", str(out)])
    return out


def _steppe(words: list[str]) -> None:
    """Run one command as a user would. Raises RuntimeError with its last words if it fails."""
    line = [sys.executable, "-P", "-m", "launch.cli", *words]
    # In a session of its own, where Ctrl-C does not reach it: it is asked to stop once, and sees its ranks through.
    with subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, said = process.communicate()
        except BaseException:
            process.terminate()
            try:
                process.communicate()
            finally:  # nobody waits any longer
                process.kill()
            raise
    if process.returncode:
        last_words = " | ".join(said.strip().splitlines()[-3:])
        raise RuntimeError(f"`steppe {words[0]}` ended with exit code {process.returncode}: {last_words}")


def _print_tables(result: dict[str, Any]) -> None:
    rounds = f"{result['rounds']} rounds after one that warms up; medians (min-max), {result['cores']} cores."
    if commands := result.get("commands"):
        rows = [[name, in_words(spread, 3)] for name, spread in commands["seconds"].items()]
        print_part("Commands", ("command", "seconds"), rows, commands["what"], rounds, commands)
    if first := result.get("first_step"):
        rows = [[name, in_words(spread, 2)] for name, spread in first["phases"].items()]
        rows.append(["all", in_words(first["seconds"], 2)])
        title = f"First step: {first['recipe']}, ranks: {first['ranks']}"
        note = f"From the command on, with a micro-batch a rank. {rounds}"
        print_part(title, ("phase", "seconds"), rows, PHASES, note, first)
    if resume := result.get("resume"):
        rows = [[name, in_words(spread, 3)] for name, spread in resume["seconds"].items()]
        what = {
            "read": "the file into memory that is there, hashed in one piece, from the page cache",
            "load": "`load_checkpoint` into the engine: verified, and the weights renewed",
        }
        title = f"Loading {resume['recipe']}, {resume['state_bytes'] / 1e9:.3f} GB"
        print_part(title, ("act", "seconds"), rows, what, f"{rounds} Ratios pair by pair.", resume)
