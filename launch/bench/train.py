"""`steppe bench train`: tokens/s and memory of a recipe in bf16, in turn with peers on the same work."""

import importlib.util
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.bench.contenders import CONTENDERS, PEERS

WARM_UP_STEPS = 2


def train(
    recipe: Annotated[str, typer.Option(help="The recipe whose model and optimizer are run.")] = "58m",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a turn.")] = 4,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 512,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 8,
    peers: Annotated[
        list[str], typer.Option("--peer", help=f"Whom to compare with: {', '.join(PEERS)}. May be repeated.")
    ] = list(PEERS),  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Tokens/s and peak memory of training on this machine, in turn with transformers on the same work."""
    result = run(recipe, rounds, steps, sequence_length, micro_batch_size, peers)
    if as_json:
        print(json.dumps(result))
    else:
        _print_table(result)


def run(
    recipe: str, rounds: int, steps: int, sequence_length: int, micro_batch_size: int, peers: list[str]
) -> dict[str, Any]:
    """Measure; returns what `--json` prints. Raises ValueError for an unknown peer or one that is not installed."""
    from launch.bench.turns import Contender, Spread, ratios, take_turns
    from launch.run import recipe_path
    from pretrain.recipe import load_config

    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"--peer {peer} is not known: choose from {', '.join(PEERS)}")
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("the peers need the package transformers, which is not installed: pip install transformers")
    overrides = [
        "precision=bf16",
        "model.document_mask=false",
        "parallel={zero_stage: 1, activation_checkpointing: none}",
        f"data={{sequence_length: {sequence_length}, sources: [{{name: random, path: none}}]}}",
        f"batch={{global_batch_size: {micro_batch_size}, micro_batch_size: {micro_batch_size}, ramp: []}}",
        "evaluation={every_steps: 0}",
    ]
    config = load_config(recipe_path(recipe), overrides)
    threads = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steppe-bench-"))) / "config.json"
        path.write_text(config.model_dump_json(), encoding="utf-8")
        contenders, built = [], []
        for name in ("steppe", *dict.fromkeys(peers)):
            _say(f"building {name}")
            contender = stack.enter_context(Contender(name, "launch.bench.train_contender", [name, str(path)], threads))
            built.append(contender.built())
            contenders.append(contender)
        _say(f"warming up, {WARM_UP_STEPS} steps each")
        first = take_turns(contenders, 1, {"steps": WARM_UP_STEPS}, lambda name, number: None)
        answers = take_turns(
            contenders, rounds, {"steps": steps}, lambda name, number: _say(f"round {number + 1}/{rounds}: {name}")
        )
    tokens = steps * sequence_length * micro_batch_size
    speeds = {name: [tokens / turn["seconds"] for turn in turns] for name, turns in answers.items()}
    return {
        "recipe": recipe,
        "model": config.model.model_dump(mode="json"),
        "sequence_length": sequence_length,
        "micro_batch_size": micro_batch_size,
        "grad_clip": config.optimizer.grad_clip,
        "threads": threads,
        "torch": built[0]["torch"],
        "rounds": rounds,
        "steps": steps,
        "contenders": {
            name: {
                "what": CONTENDERS[name],
                "tokens_per_second": Spread.of(speeds[name]).as_dict(),
                "tokens_per_second_by_round": speeds[name],
                "peak_memory_bytes": max(turn["peak_memory_bytes"] for turn in turns),
                "loss_after_warm_up": first[name][0]["loss"],
                "loss_at_end": turns[-1]["loss"],
            }
            for name, turns in answers.items()
        },
        "ratios": {
            f"steppe/{peer}": ratios(speeds["steppe"], speeds[peer]).as_dict() for peer in speeds if peer in PEERS
        },
    }


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from launch.bench.turns import Spread

    table = Table(
        title=f"{result['recipe']}: sequences of {result['sequence_length']}, {result['micro_batch_size']} a step, "
        f"{result['threads']} threads, torch {result['torch']}",
        title_justify="left",
    )
    table.add_column("contender")
    for header in ("tokens/s", "min to max", "steppe / it", "min to max", "peak memory", "last loss"):
        table.add_column(header, justify="right")
    for name, contender in result["contenders"].items():
        speed, ratio = Spread(**contender["tokens_per_second"]), result["ratios"].get(f"steppe/{name}")
        table.add_row(
            name,
            f"{speed.median:,.0f}",
            f"{speed.min:,.0f} to {speed.max:,.0f}",
            *([f"{ratio['median']:.3f}", f"{ratio['min']:.3f} to {ratio['max']:.3f}"] if ratio else ["", ""]),
            f"{contender['peak_memory_bytes'] / 1e9:.2f} GB",
            f"{contender['loss_at_end']:.4f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for name, contender in result["contenders"].items():
        console.print(f"{name}: {contender['what']}, clipping {result['grad_clip']:g}", highlight=False, soft_wrap=True)
    console.print(
        f"{result['rounds']} rounds of {result['steps']} steps in alternating order; all have the same initial weights "
        "and random tokens; memory is the peak of each process.",
        highlight=False,
        soft_wrap=True,
    )
