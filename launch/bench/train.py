"""`steppe bench train`: tokens/s and memory of a recipe in bf16, in turn with peers on the same work."""

import json
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.bench.contenders import CONTENDERS, DENSE, PEERS, peers_of

WARM_UP_STEPS = 2
SAME_LOSS = 2e-3  # of the first step, relative: both in bf16, each rounding in places of its own


def train(
    recipe: Annotated[str, typer.Option(help="The recipe whose model and optimizer are run.")] = "58m",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a turn.")] = 4,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 512,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 8,
    peers: Annotated[
        list[str],
        typer.Option("--peer", help=f"Whom to compare with, of {', '.join(PEERS)}; may be repeated. All by default."),
    ] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Tokens/s and peak memory of training on this machine, in turn with transformers on the same work, and where the
    recipe has experts with a dense model of as many active parameters."""
    result = run(recipe, rounds, steps, sequence_length, micro_batch_size, peers)
    if as_json:
        print(json.dumps(result))
    else:
        _print_table(result)


def run(
    recipe: str, rounds: int, steps: int, sequence_length: int, micro_batch_size: int, peers: list[str]
) -> dict[str, Any]:
    """Measure; returns what `--json` prints. Raises ValueError for a peer that is unknown or does not have such
    a model; RuntimeError if one does other work than ours."""
    from launch.bench.dense_counterpart import dense_counterpart
    from launch.bench.turns import Contender, Spread, ratios, take_turns
    from launch.run_folder import recipe_path
    from model.accounting import parameter_counts
    from pretrain.config import RunConfig
    from pretrain.recipe import load_config

    overrides = [
        "precision=bf16",
        "model.document_mask=false",
        "parallel={zero_stage: 1, tensor: 1, sequence: 1, expert: 1, activation_checkpointing: none}",
        f"data={{sequence_length: {sequence_length}, sources: [{{name: random, path: none}}]}}",
        f"batch={{global_batch_size: {micro_batch_size}, micro_batch_size: {micro_batch_size}, ramp: []}}",
        "evaluation={every_steps: 0}",
    ]
    config: RunConfig = load_config(recipe_path(recipe), overrides)
    peers = peers_of(config.model, peers)
    if set(peers) - {DENSE}:
        check_transformers(config)
    models = {name: dense_counterpart(config.model) if name == DENSE else config.model for name in ("steppe", *peers)}
    counts = {name: parameter_counts(model) for name, model in models.items()}
    threads = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steppe-bench-"))) / "config.json"
        path.write_text(config.model_dump_json(), encoding="utf-8")
        contenders, built = [], {}
        for name in models:
            _say(f"building {name}")
            contender = stack.enter_context(Contender(name, "launch.bench.train_contender", [name, str(path)], threads))
            built[name] = contender.built()
            contenders.append(contender)
        _say(f"warming up, {WARM_UP_STEPS} steps each")
        warm_up = take_turns(contenders, 1, {"steps": WARM_UP_STEPS}, lambda name, number: None)
        first_losses = {name: turns[0]["losses"][0] for name, turns in warm_up.items()}
        check_same_work({name: loss for name, loss in first_losses.items() if name != DENSE})
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
        "torch": built["steppe"]["torch"],
        "rounds": rounds,
        "steps": steps,
        "contenders": {
            name: {
                "what": CONTENDERS[name],
                **built[name]["about"],
                "ffn_size": models[name].ffn_size,
                "active_parameters": counts[name]["active"],
                "total_parameters": counts[name]["total"],
                "tokens_per_second": Spread.of(speeds[name]).as_dict(),
                "tokens_per_second_by_round": speeds[name],
                "peak_memory_bytes": max(turn["peak_memory_bytes"] for turn in turns),
                "loss_at_first_step": first_losses[name],
                "loss_at_end": turns[-1]["losses"][-1],
            }
            for name, turns in answers.items()
        },
        "ratios": {f"steppe/{peer}": ratios(speeds["steppe"], speeds[peer]).as_dict() for peer in peers},
    }


def check_transformers(config: Any) -> None:
    """Raise ValueError unless transformers has a model like this RunConfig's."""
    from pretrain.hf import config_to_hf

    try:
        config_to_hf(config.model)
    except ValueError as error:
        remedy = f"compare with --peer {DENSE} alone" if config.model.moe is not None else "choose another recipe"
        raise ValueError(f"transformers has no model to compare with: {error}; {remedy}") from error


def check_same_work(first_losses: dict[str, float]) -> None:
    """Raise RuntimeError unless all have the first one's loss at their first step, that of one model on one batch."""
    ours, expected = next(iter(first_losses.items()))
    for name, loss in first_losses.items():
        if not abs(loss - expected) <= SAME_LOSS * abs(expected):
            raise RuntimeError(
                f"{name} has a loss of {loss:.4f} at its first step, {ours} one of {expected:.4f}: it is not the same "
                "work, and its speed says nothing"
            )


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
    for header in ("tokens/s", "min to max", "steppe / it", "min to max", "memory", "first loss", "last"):
        table.add_column(header, justify="right")
    for name, contender in result["contenders"].items():
        speed, ratio = Spread(**contender["tokens_per_second"]), result["ratios"].get(f"steppe/{name}")
        table.add_row(
            name,
            f"{speed.median:,.0f}",
            f"{speed.min:,.0f} to {speed.max:,.0f}",
            *([f"{ratio['median']:.3f}", f"{ratio['min']:.3f} to {ratio['max']:.3f}"] if ratio else ["", ""]),
            f"{contender['peak_memory_bytes'] / 1e9:.2f} GB",
            f"{contender['loss_at_first_step']:.4f}",
            f"{contender['loss_at_end']:.4f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for name, contender in result["contenders"].items():
        console.print(f"{name}: {_in_words(contender)}", highlight=False, soft_wrap=True)
    console.print(
        f"{result['rounds']} rounds of {result['steps']} steps in alternating order, gradients clipped to "
        f"{result['grad_clip']:g}; models of the same shape have the same initial weights, and all the same random "
        "tokens; memory is the peak of each process.",
        highlight=False,
        soft_wrap=True,
    )


def _in_words(contender: dict[str, Any]) -> str:
    """What one is, on a line."""
    active, total = contender["active_parameters"], contender["total_parameters"]
    words = [contender["what"], f"{active:,} parameters" + (f" active of {total:,}" if active != total else "")]
    if "class" in contender:
        words.append(contender["class"])
    if "experts" in contender:
        seconds = contender["forward_backward_seconds_by_experts"].items()
        tried = ", ".join(f"{name} {value:.2f} s" for name, value in seconds)
        words.append(f"experts_implementation={contender['experts']}, the fastest (forward and backward: {tried})")
    return "; ".join(words)
