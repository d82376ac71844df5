"""`steppe bench train`: tokens/s and memory of a recipe in bf16, in turn with peers on the same work."""

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.bench.contenders import (
    COMPILED,
    CONTENDERS,
    DENSE,
    EAGER,
    FAMILIES,
    GET_LITGPT,
    OWN_WEIGHTS,
    keeps_memory,
    peers_of,
)
from launch.bench.data_tables import say
from launch.bench.fixed_config import fixed_config

if TYPE_CHECKING:
    from launch.bench.turns import Contender
    from pretrain.config import RunConfig

WARM_UP_STEPS = 2
# Each turn begins with a step that does not count: in it a process gets back the memory that it gave up for the others.
UNMEASURED_STEPS = 1
SAME_LOSS = 2e-3  # of the first step, relative: both in bf16, each rounding in places of its own
OVERHEAD = 0.03  # of DeepSpeed, from which on it is itemised
PROFILED_STEPS = 3


def train(
    recipe: Annotated[str, typer.Option(help="The recipe whose model and optimizer are run.")] = "58m",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a turn.")] = 4,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 512,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a step, of each rank.")] = 8,
    peers: Annotated[
        str | None,
        typer.Option(
            help=f"Whom to compare with, of {', '.join(FAMILIES)}, or single variants of them, separated by commas. "
            f"All that are there by default. litgpt: {GET_LITGPT}. nanogpt: a clone of karpathy/nanoGPT."
        ),
    ] = None,
    nanogpt: Annotated[Path | None, typer.Option(help="The folder of a clone of karpathy/nanoGPT.")] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe's key; may be repeated.")
    ] = [],  # noqa: B006
    keep_memory: Annotated[
        bool, typer.Option("--keep-memory", help="Let peers, too, keep the memory that they free, as Steppe does.")
    ] = False,
    ranks: Annotated[
        int, typer.Option(min=1, help="Above 1: Steppe on so many ranks beside itself on one, without peers.")
    ] = 1,
    zero_stage: Annotated[int, typer.Option(min=1, max=3, help="ZeRO's stage.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Tokens/s and peak memory of training on this machine, in turn with peers on the same work, with a bare loop, and
    with the limit: this step's own matrix products, attention and AdamW, each timed alone."""
    from launch.bench.train_ranks import print_ranks, run_ranks
    from launch.bench.train_table import print_table

    config = bench_config(recipe, sequence_length, micro_batch_size, overrides, zero_stage, ranks)
    if ranks > 1:
        of_peers = {"--peers": peers is not None, "--nanogpt": nanogpt is not None, "--keep-memory": keep_memory}
        if given := [option for option, is_given in of_peers.items() if is_given]:
            raise ValueError(f"--ranks {ranks} compares Steppe with itself: leave out {', '.join(given)}")
        result, show = run_ranks(recipe, config, ranks, rounds, steps), print_ranks
    else:
        result, show = run(recipe, config, rounds, steps, peers, nanogpt, keep_memory), print_table
    if as_json:
        print(json.dumps(result))
    else:
        show(result)


def bench_config(
    recipe: str,
    sequence_length: int,
    micro_batch_size: int,
    overrides: list[str] | tuple[str, ...] = (),
    zero_stage: int = 1,
    ranks: int = 1,
) -> "RunConfig":
    """The recipe as it is measured. Raises ValueError if an override changes what all contenders have in common."""
    fixed: dict[str, Any] = {
        "precision": "bf16",
        "deterministic": False,
        "model.document_mask": False,
        "parallel.zero_stage": zero_stage,
        "parallel.tensor": 1,
        "parallel.sequence": 1,
        "parallel.expert": 1,
        "parallel.activation_checkpointing": "none",
        "data.sequence_length": sequence_length,
        "batch.global_batch_size": micro_batch_size * ranks,
        "batch.micro_batch_size": micro_batch_size,
    }
    if ranks == 1:  # compiled, Steppe is a contender of its own
        fixed["parallel.compile"] = False
    settings = ["data.sources=[{name: random, path: none}]", "batch.ramp=[]", "evaluation={every_steps: 0}"]
    return fixed_config(recipe, settings, fixed, overrides)


def run(
    recipe: str,
    config: "RunConfig",
    rounds: int,
    steps: int,
    peers: str | None = None,
    nanogpt: Path | None = None,
    keep_memory: bool = False,
) -> dict[str, Any]:
    """Measure; returns what `--json` prints. Raises ValueError for a peer that is unknown or cannot take part,
    or for another optimizer than theirs; RuntimeError if one does other work than ours."""
    from launch.bench.dense_counterpart import dense_counterpart
    from launch.bench.train_job import Job
    from launch.bench.turns import Contender, Spread, ratios, take_turns
    from model.accounting import parameter_counts
    from pretrain.host_memory import malloc_environment

    if config.optimizer.name != "adamw":
        raise ValueError(
            f"optimizer.name={config.optimizer.name}: the peers and the limit are of adamw: set that, or compare "
            "Steppe with itself (--ranks)"
        )
    names, left_out = peers_of(config.model, peers, nanogpt)
    for name, why in left_out.items():
        say(f"without {name}: {why}")
    names = ["steppe", *names]
    models = {name: dense_counterpart(config.model) if name == DENSE else config.model for name in names}
    counts = {name: parameter_counts(model) for name, model in models.items()}
    threads = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steppe-bench-"))) / "job.json"
        path.write_text(
            Job(config=config, keep_memory=keep_memory, nanogpt=nanogpt).model_dump_json(), encoding="utf-8"
        )
        contenders, built = {}, {}
        for name in names:
            say(f"building {name}")
            contender = stack.enter_context(
                Contender(
                    name,
                    "launch.bench.train_contender",
                    [name, str(path)],
                    threads,
                    environment=malloc_environment(os.environ) if keeps_memory(name, keep_memory) else {},
                )
            )
            built[name] = contender.built()
            contenders[name] = contender
        warm_up = take_turns(
            list(contenders.values()), 1, {"steps": WARM_UP_STEPS}, lambda name, number: say(f"warming up: {name}")
        )
        first_losses = {name: turns[0]["losses"][0] for name, turns in warm_up.items()}
        check_same_work({name: loss for name, loss in first_losses.items() if name not in OWN_WEIGHTS})
        answers = take_turns(
            list(contenders.values()),
            rounds,
            {"steps": steps, "unmeasured": UNMEASURED_STEPS},
            lambda name, number: say(f"round {number + 1}/{rounds}: {name}"),
        )
        tokens = config.data.sequence_length * config.batch.micro_batch_size
        speeds = {name: [tokens * steps / turn["seconds"] for turn in turns] for name, turns in answers.items()}
        say("the limit: a step's own operations, each alone")
        parts = contenders["steppe"].ask(limit=True)["limit"]
        overhead = measured_overhead(contenders, speeds) if "bare" in names else None
    memory = {name: max(turn["peak_memory_bytes"] for turn in turns) for name, turns in answers.items()}
    limit = tokens / sum(parts.values())
    return {
        "recipe": recipe,
        "model": config.model.model_dump(mode="json"),
        "sequence_length": config.data.sequence_length,
        "micro_batch_size": config.batch.micro_batch_size,
        "zero_stage": config.parallel.zero_stage,
        "grad_clip": config.optimizer.grad_clip,
        "keep_memory": keep_memory,
        "threads": threads,
        "torch": built["steppe"]["torch"],
        "rounds": rounds,
        "steps": steps,
        "contenders": {
            name: {
                "what": CONTENDERS[name],
                "ffn_size": models[name].ffn_size,
                "active_parameters": counts[name]["active"],
                "total_parameters": counts[name]["total"],
                **built[name]["about"],
                "tokens_per_second": Spread.of(speeds[name]).as_dict(),
                "tokens_per_second_by_round": speeds[name],
                "peak_memory_bytes": memory[name],
                "peak_memory_of_eager": memory[name] / memory[EAGER] if EAGER in memory else None,
                "loss_at_first_step": first_losses[name],
                "loss_at_end": turns[-1]["losses"][-1],
            }
            for name, turns in answers.items()
        },
        "ratios": {
            f"{own}/{name}": ratios(speeds[own], speeds[name]).as_dict()
            for own in ("steppe", COMPILED)
            for name in names[1:]
            if own in names and name != own
        },
        "limit": {
            "tokens_per_second": limit,
            "seconds_a_step": parts,
            "reached": {
                own: Spread.of([speed / limit for speed in speeds[own]]).as_dict()
                for own in ("steppe", COMPILED)
                if own in names
            },
        },
        "overhead": overhead,
        "left_out": left_out,
    }


def measured_overhead(contenders: Mapping[str, "Contender"], speeds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Steppe's time of a step over the bare loop's, and where that is more than OVERHEAD above 1, in what: see
    `surplus`."""
    from launch.bench.train_overhead import surplus
    from launch.bench.turns import ratios

    of_bare = ratios(speeds["bare"], speeds["steppe"])
    items: list[dict[str, Any]] = []
    if of_bare.median - 1 > OVERHEAD:
        say(f"DeepSpeed takes {of_bare.median - 1:.1%} of the bare loop: profiling both")
        found = {name: contenders[name].ask(profile=PROFILED_STEPS)["operators"] for name in ("steppe", "bare")}
        items = surplus(found["steppe"], found["bare"])
    return {"of_bare": of_bare.as_dict(), "aim": 1 + OVERHEAD, "operators": items}


def check_same_work(first_losses: dict[str, float]) -> None:
    """Raise RuntimeError unless all have the first one's loss at their first step, that of one model on one batch."""
    ours, expected = next(iter(first_losses.items()))
    for name, loss in first_losses.items():
        if not abs(loss - expected) <= SAME_LOSS * abs(expected):
            raise RuntimeError(
                f"{name} has a loss of {loss:.4f} at its first step, {ours} one of {expected:.4f}: it is not the same "
                "work, and its speed says nothing"
            )
