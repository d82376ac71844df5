"""`steppe bench memory`: peak memory of a rank, measured against the accounting, by ZeRO stage and recomputation."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.bench.fixed_config import fixed_config

# In 16 bits stage 0 has no masters, and is refused.
STAGES = {0: "fp32", 1: "bf16", 2: "bf16", 3: "bf16"}
MODES = ("none", "selective", "full")
# The second step is as every later one: optimizer states are there, and ZeRO 3 knows the order of the modules.
STEPS = 2


def memory(
    nproc: Annotated[int, typer.Option(min=1, help="Ranks on this machine.")] = 2,
    layers: Annotated[int, typer.Option(min=1, help="Blocks of the model.")] = 6,
    hidden_size: Annotated[int, typer.Option(min=64, help="Its width, a multiple of 64.")] = 384,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 512,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a forward pass.")] = 4,
    stages: Annotated[list[int], typer.Option("--zero-stage", help="May be repeated.", min=0, max=3)] = list(STAGES),  # noqa: B006
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key of every setting, such as a degree.")
    ] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Peak memory of a rank against the accounting of `steppe plan`, by ZeRO stage and activation checkpointing."""
    result = run(nproc, layers, hidden_size, sequence_length, micro_batch_size, stages, overrides)
    if as_json:
        print(json.dumps(result))
    else:
        _print_table(result)


def run(
    nproc: int,
    layers: int,
    hidden_size: int,
    sequence_length: int,
    micro_batch_size: int,
    stages: list[int],
    overrides: list[str],
    modes: tuple[str, ...] = MODES,
) -> dict[str, Any]:
    """Measure each setting in processes of its own; returns what `--json` prints.

    Raises ValueError for a width that heads of 64 do not fill, or an override of what is measured one by one.
    """
    import torch

    from model.accounting import parameter_counts

    if hidden_size % 64:
        raise ValueError(f"--hidden-size {hidden_size} is no multiple of 64, the size of a head: choose one")
    model = {
        "hidden_size": hidden_size,
        "num_layers": layers,
        "num_heads": hidden_size // 64,
        "ffn_size": hidden_size * 8 // 3 // 64 * 64,
        "vocab_size": 8192,
    }
    shape = [
        f"model={json.dumps(model)}",
        "data={sources: [{name: random, path: none}]}",
        "batch={ramp: []}",
        # DeepSpeed's own bucket would hide a model of this size.
        "deepspeed={zero_optimization: {reduce_bucket_size: 4_000_000}}",
        "evaluation={every_steps: 0}",
    ]
    batch = {
        "data.sequence_length": sequence_length,
        # Two micro-batches a rank: in the second, the first one's gradients are there.
        "batch.global_batch_size": 2 * micro_batch_size * nproc,
        "batch.micro_batch_size": micro_batch_size,
    }
    configs = []
    for stage in stages:
        for mode in modes:
            layout = {"parallel.zero_stage": stage, "parallel.activation_checkpointing": mode}
            configs.append(fixed_config("58m", shape, {**batch, "precision": STAGES[stage], **layout}, overrides))
    settings = []
    for config in configs:
        settings.append(_measured(config, nproc))
        _say("ZeRO {zero_stage}, {precision}, recompute {activation_checkpointing}: {ratio:.3f}", settings[-1])
    return {
        "ranks": nproc,
        "model": config.model.model_dump(mode="json"),
        "parameters": parameter_counts(config.model)["total"],
        "sequence_length": sequence_length,
        "micro_batch_size": micro_batch_size,
        "torch": torch.__version__,
        "settings": settings,
    }


def _measured(config: Any, nproc: int) -> dict[str, Any]:
    """One setting: the rank with the highest peak, and what was accounted."""
    import torch

    from launch.ranks import StoppedError, run_ranks
    from pretrain.memory import rank_memory

    accounted = rank_memory(config, nproc, fused=torch.cuda.is_available())
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as folder:
        path = Path(folder) / "config.json"
        path.write_text(config.model_dump_json(), encoding="utf-8")
        try:
            run_ranks("launch.bench.memory_rank", [str(path), str(STEPS), folder], nproc)
        except StoppedError:
            raise KeyboardInterrupt from None  # as the other benchmarks end
        ranks = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(folder).glob("rank_*.json"))]
    fullest = max(ranks, key=lambda rank: rank["peak_bytes"])
    return {
        "zero_stage": config.parallel.zero_stage,
        "precision": config.precision,
        "activation_checkpointing": config.parallel.activation_checkpointing,
        "measured_bytes": fullest["peak_bytes"],
        "resident_bytes": fullest["resident_bytes"],
        "accounted_bytes": accounted.total,
        "moment": accounted.moment,
        "ratio": fullest["peak_bytes"] / accounted.total,
    }


def _say(text: str, setting: dict[str, Any]) -> None:
    print("bench: " + text.format(**setting), file=sys.stderr, flush=True)


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    model = result["model"]
    table = Table(
        title=f"{result['parameters'] / 1e6:.1f} M parameters ({model['num_layers']} x {model['hidden_size']}), "
        f"{result['micro_batch_size']} x {result['sequence_length']} tokens a forward pass, {result['ranks']} ranks, "
        f"torch {result['torch']}",
        title_justify="left",
    )
    for header in ("ZeRO", "precision", "recompute"):
        table.add_column(header)
    for header in ("measured MB", "accounted MB", "ratio", "resident MB"):
        table.add_column(header, justify="right")
    table.add_column("fullest at")
    for setting in result["settings"]:
        table.add_row(
            str(setting["zero_stage"]),
            setting["precision"],
            setting["activation_checkpointing"],
            f"{setting['measured_bytes'] / 1e6:.1f}",
            f"{setting['accounted_bytes'] / 1e6:.1f}",
            f"{setting['ratio']:.3f}",
            f"{setting['resident_bytes'] / 1e6:.1f}",
            setting["moment"],
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        f"Measured: the most that torch's allocator held in step {STEPS}, of the rank with most; resident: by how much "
        "the process grew, with what its libraries need. Two micro-batches a step.",
        highlight=False,
        soft_wrap=True,
    )
