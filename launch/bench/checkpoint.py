"""`steppe bench checkpoint`: how long training waits for a checkpoint and how fast it is durable, beside peers."""

import json
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.bench import checkpoint_plan
from launch.bench.contenders import LOADERS, SAVERS, savers_of
from launch.bench.turns import Contender, Guest, Spread, ratios, take_turns

STALL_TARGET = 0.05  # of a blocking save
SPEED_TARGET = 0.8  # of a raw write with hashing

PLANNED_RANKS = 1024


def checkpoint(
    recipe: Annotated[str, typer.Option(help="The recipe whose state is saved.")] = "58m",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 5,
    folder: Annotated[
        Path, typer.Option("--dir", help="Where to write; a temporary folder is made in it, and removed.")
    ] = Path("."),
    peers: Annotated[
        list[str],
        typer.Option(
            "--peer",
            help="Whom to compare with, of "
            + ", ".join(name for name, saver in SAVERS.items() if saver.peer)
            + "; may be repeated. All by default.",
        ),
    ] = [],  # noqa: B006
    plan: Annotated[
        str, typer.Option(metavar="RECIPE", help="Measure instead what planning costs for this recipe on many ranks.")
    ] = "",
    ranks: Annotated[
        int | None, typer.Option(min=2, help=f"How many, with --plan; {PLANNED_RANKS} by default.")
    ] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe.")
    ] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Stall and durable GB/s of a checkpoint in turn with a raw write, torch.save, torch's distributed checkpoint and
    DeepSpeed's own; GB/s of loading it; and with --plan what the index of a large run costs."""
    if plan:
        result = checkpoint_plan.run(plan, ranks or PLANNED_RANKS, overrides)
    elif ranks is not None:
        raise ValueError(f"--ranks {ranks} goes with --plan RECIPE: add that, or leave it out")
    else:
        result = run(recipe, rounds, folder, peers, overrides)
    if as_json:
        print(json.dumps(result))
    elif plan:
        checkpoint_plan.print_table(result)
    else:
        _print_tables(result)


def run(recipe: str, rounds: int, folder: Path, peers: list[str], overrides: list[str]) -> dict[str, Any]:
    """Measure; returns what `--json` prints.

    Raises ValueError for an unknown peer, a folder that is none, or a recipe that cannot run on one rank;
    RuntimeError if what a contender saved is not what it reads back.
    """
    from launch.run_folder import recipe_path
    from pretrain.layout import check_layout
    from pretrain.recipe import load_config

    savers = savers_of(peers)
    loaders = [name for name, loader in LOADERS.items() if loader.saver in savers]
    if not folder.is_dir():
        raise ValueError(f"--dir {folder} is no folder: make it first, or name another")
    config = load_config(recipe_path(recipe), ["data={sources: [{name: random, path: none}]}", *overrides])
    single = config.batch.model_copy(update={"global_batch_size": config.batch.micro_batch_size, "ramp": ()})
    config = config.model_copy(update={"batch": single})
    check_layout(config, 1)
    threads = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steppe-bench-", dir=folder))).resolve()
        path = scratch / "config.json"
        path.write_text(config.model_dump_json(), encoding="utf-8")
        _say("building")
        host = stack.enter_context(
            Contender("checkpoint", "launch.bench.checkpoint_contender", [str(path), str(scratch)], threads)
        )
        built = host.built()
        saves = _in_turns(host, "save", savers, rounds)
        loads = _in_turns(host, "load", loaders, rounds)
    saving = {name: _saving(name, saves, built["state_bytes"]) for name in savers}
    return {
        "recipe": recipe,
        "model": config.model.model_dump(mode="json"),
        "precision": config.precision,
        "sequence_length": config.data.sequence_length,
        "micro_batch_size": config.batch.micro_batch_size,
        "folder": str(folder),
        "rounds": rounds,
        **built,
        "saving": saving,
        "loading": {name: _loading(name, loads, built["state_bytes"]) for name in loaders},
        "targets": verdicts(saving),
    }


def _in_turns(host: Contender, act: str, names: list[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The answers of contenders by round, after a round that warms up and checks them."""
    guests = [Guest(name, host) for name in names]
    checked = take_turns(
        guests, 1, {"act": act, "check": True}, lambda name, number: _say(f"warming up, {act}: {name}")
    )
    for name, answers in checked.items():
        if not answers[0]["same"]:
            raise RuntimeError(f"{name}: what is read back is not what was saved, and its speed says nothing")
    return take_turns(
        guests,
        rounds,
        {"act": act, "check": False},
        lambda name, number: _say(f"round {number + 1}/{rounds}, {act}: {name}"),
    )


def _saving(name: str, everyone: dict[str, list[dict[str, Any]]], state_bytes: int) -> dict[str, Any]:
    """What is said of a saver. GB/s are of the state, whatever else a saver writes."""

    def of(answers: list[dict[str, Any]], key: str) -> list[float]:
        return [answer[key] for answer in answers]

    turns = everyone[name]
    seconds, stalls = of(turns, "seconds"), of(turns, "stall_seconds")
    beside = {}
    if "steps" in turns[0]:
        beside = {
            "steps": sum(of(turns, "steps")),
            "undisturbed_step_seconds": Spread.of(of(turns, "undisturbed_step_seconds")).as_dict(),
            "slowdown_seconds": Spread.of(of(turns, "slowdown_seconds")).as_dict(),
        }
    return {
        "what": SAVERS[name].what,
        "pickle": SAVERS[name].pickle,
        "written_bytes": turns[-1]["written_bytes"],
        "seconds": Spread.of(seconds).as_dict(),
        "gb_per_second": Spread.of([state_bytes / 1e9 / value for value in seconds]).as_dict(),
        "speed_of_raw": ratios(of(everyone["raw"], "seconds"), seconds).as_dict(),
        "speed_of_raw_beside": ratios(of(everyone["raw-beside"], "seconds"), seconds).as_dict(),
        "stall_seconds": Spread.of(stalls).as_dict(),
        "stall_of_blocking": ratios(stalls, of(everyone["steppe-blocking"], "seconds")).as_dict(),
        **beside,
        "by_round": turns,
    }


def _loading(name: str, everyone: dict[str, list[dict[str, Any]]], state_bytes: int) -> dict[str, Any]:
    seconds = [turn["seconds"] for turn in everyone[name]]
    ours = [turn["seconds"] for turn in everyone["steppe"]]
    return {
        "what": LOADERS[name].what,
        "seconds": Spread.of(seconds).as_dict(),
        "gb_per_second": Spread.of([state_bytes / 1e9 / value for value in seconds]).as_dict(),
        "steppe_is_faster_by": ratios(seconds, ours).as_dict(),
        "seconds_by_round": seconds,
    }


def verdicts(saving: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets, and whether they were met, by the medians of the pairs."""
    blocking, beside = saving["steppe-blocking"], saving["steppe-async"]
    found: list[dict[str, Any]] = [
        {"what": "stall of steppe-async / a blocking save", "below": STALL_TARGET, **beside["stall_of_blocking"]}
    ]
    for what, speed in {
        "durable GB/s of steppe-blocking / raw": blocking["speed_of_raw"],
        "durable GB/s of steppe-async, beside training / raw": beside["speed_of_raw"],
        "durable GB/s of steppe-async / raw-beside, both beside training": beside["speed_of_raw_beside"],
    }.items():
        found.append({"what": what, "at least": SPEED_TARGET, **speed})
    for verdict in found:
        low, high = verdict.get("at least", 0.0), verdict.get("below", float("inf"))
        verdict["met"] = low <= verdict["median"] < high
    return found


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _print_tables(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    def spread(value: dict[str, float], digits: int = 2) -> str:
        return f"{value['median']:.{digits}f} ({value['min']:.{digits}f}-{value['max']:.{digits}f})"

    console = Console(width=None if sys.stdout.isatty() else 120)
    saving = Table(
        title=f"{result['recipe']}: {result['state_bytes'] / 1e9:.3f} GB of fp32 masters and moments, one rank, "
        f"{result['threads']} threads, torch {result['torch']}",
        title_justify="left",
    )
    saving.add_column("saving", no_wrap=True)
    for header in ("seconds", "GB/s", "of raw", "stall s", "/ blocking", "slower s", "GB"):
        saving.add_column(header, justify="right")
    saving.add_column("pickle")
    for name, saver in result["saving"].items():
        slowdown = saver.get("slowdown_seconds")
        saving.add_row(
            name,
            spread(saver["seconds"]),
            f"{saver['gb_per_second']['median']:.2f}",
            spread(saver["speed_of_raw"]),
            f"{saver['stall_seconds']['median']:.3f}",
            f"{saver['stall_of_blocking']['median']:.3f}",
            f"{slowdown['median']:.2f}" if slowdown else "",
            f"{saver['written_bytes'] / 1e9:.3f}",
            "yes" if saver["pickle"] else "no",
        )
    console.print(saving)
    loading = Table(title="Loading what was saved, from a warm page cache, into the engine", title_justify="left")
    loading.add_column("loading", no_wrap=True)
    for header in ("seconds", "GB/s", "steppe is faster by"):
        loading.add_column(header, justify="right")
    for name, loader in result["loading"].items():
        loading.add_row(
            name,
            spread(loader["seconds"]),
            f"{loader['gb_per_second']['median']:.2f}",
            "" if name == "steppe" else spread(loader["steppe_is_faster_by"]),
        )
    console.print(loading)
    for act in ("saving", "loading"):
        for name, contender in result[act].items():
            console.print(f"{act}, {name}: {contender['what']}", highlight=False, soft_wrap=True)
    undisturbed = result["saving"]["steppe-async"]["undisturbed_step_seconds"]
    console.print(
        f"{result['rounds']} rounds in alternating order; medians (min-max), ratios pair by pair. A save is over when "
        "files and folder are fsynced. GB/s are of the state. Stall: for how long training stood still; slower: how "
        f"much longer the steps beside a save took, of {undisturbed['median']:.2f} s undisturbed, on the same threads.",
        highlight=False,
        soft_wrap=True,
    )
    for verdict in result["targets"]:
        target = next(f"{word} {verdict[word]}" for word in ("below", "at least") if word in verdict)
        console.print(
            f"{'met' if verdict['met'] else 'MISSED'}: {verdict['what']} is {spread(verdict, 3)}, to be {target}",
            highlight=False,
            soft_wrap=True,
        )
