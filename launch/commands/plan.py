"""`steppe plan`: what a run needs, and whether it fits."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from launch.commands.train import Overrides

if TYPE_CHECKING:
    from launch.plan import Plan


def plan(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that comes with Steppe.")],
    gpu: Annotated[str, typer.Option(help="What each rank runs on, such as h100-80g.")],
    nodes: Annotated[int, typer.Option(help="Nodes of the job.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs, and so ranks, of a node.")] = 8,
    overrides: Overrides = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Parameters, FLOPs, steps and memory of a run on a cluster, and the nearest layout that fits."""
    from launch.gpus import gpu_named
    from launch.plan import make_plan
    from launch.run_folder import recipe_path
    from pretrain.recipe import load_config

    found = make_plan(load_config(recipe_path(recipe), overrides), nodes, gpus_per_node, gpu_named(gpu))
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        _print_tables(found)


def _print_tables(plan: "Plan") -> None:
    from rich.console import Console
    from rich.table import Table

    from launch.gpus import CONTEXT_BYTES, FRAGMENTATION
    from launch.plan import FLOPS_CONVENTION

    config, layout, memory, gpu = plan.config, plan.layout, plan.memory, plan.gpu
    parallel, length = config.parallel, config.data.sequence_length
    nodes = f"{plan.nodes} node{'s' * (plan.nodes > 1)} of {plan.gpus_per_node}"
    table = Table(title=f"{config.name} on {layout.world} x {gpu.name} ({nodes})", title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("how much", overflow="fold")
    counts = plan.parameters
    active = f", {_short(counts['active'])} active" if counts["active"] != counts["total"] else ""
    table.add_row("parameters", f"{_short(counts['total'])} ({counts['total']:,}){active}")
    table.add_row("FLOPs a token", f"{plan.flops_per_token:.4g}, forward and backward")
    table.add_row("run", f"{plan.steps:,} steps, {_short(plan.tokens)} tokens of {plan.flops:.3g} FLOPs together")
    ends = [*(f", until {_short(tokens)} tokens" for tokens, _ in config.batch.ramp), ""]
    for (sequences, count), end in zip(plan.batches, ends, strict=True):
        table.add_row(
            "global batch",
            f"{sequences:,} x {length:,} = {_short(sequences * length)} tokens, {count} forwards a rank{end}",
        )
    degrees = f"data {layout.data} x sequence {layout.sequence} x tensor {layout.tensor}"
    experts = f", experts over {layout.expert}" if config.model.moe is not None else ""
    table.add_row("layout", f"{degrees}{experts}, ZeRO {parallel.zero_stage}, {config.precision}")
    every = f" every {parallel.activation_checkpointing_every} blocks" * (parallel.activation_checkpointing_every > 1)
    micro = config.batch.micro_batch_size
    table.add_row(
        "a rank's forward", f"{micro} x {length:,} tokens, recompute {parallel.activation_checkpointing}{every}"
    )

    items = Table(title=f"memory of a rank in GB, fullest at {memory.moment}", title_justify="left")
    items.add_column("item")
    for moment in plan.moments:
        items.add_column(moment.moment, justify="right", style="bold" if moment is memory else None)
    for item in ("weights", "gradients", "optimizer", "activations", "buffers"):
        items.add_row(item, *(f"{getattr(moment, item) / 1e9:.2f}" for moment in plan.moments))
    items.add_section()
    items.add_row("together", *(f"{moment.total / 1e9:.2f}" for moment in plan.moments))

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(items)
    for line in _verdict(plan):
        console.print(line, highlight=False, soft_wrap=True)
    host = f" Each rank keeps {memory.host / 1e9:.2f} GB on the host." if memory.host else ""
    notes = (
        f"{gpu.source}. Headroom {gpu.headroom_bytes / 1e9:.1f} GB: CUDA context, workspaces and NCCL "
        f"{CONTEXT_BYTES / 1e9:.0f} GB, fragmentation {FRAGMENTATION:.0%}.{host}",
        f"FLOPs: {FLOPS_CONVENTION}.",
    )
    for note in notes:
        console.print(note, style="dim", highlight=False)


def _verdict(plan: "Plan") -> list[str]:
    """Whether it fits, and if not what would; a line to paste stands alone, whole."""
    gpu, total = plan.gpu, plan.memory.total
    verb = "fits" if plan.fits else "does not fit"
    verdict = f"It {verb}: a rank takes {total / 1e9:.1f} GB, {gpu.name} less headroom {gpu.usable_bytes / 1e9:.1f} GB."
    if plan.fits:
        return [verdict]
    if plan.nearest is None:
        return [
            verdict,
            "No layout on these GPUs does: use more nodes, GPUs with more memory, or parallel.offload_optimizer=cpu.",
        ]
    words = " ".join(f"--set {override}" for override in plan.nearest.overrides)
    return [verdict, f"The nearest layout that does takes {plan.nearest.memory.total / 1e9:.1f} GB:", f"  {words}"]


def _short(number: int) -> str:
    """Such as 6.74 B."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:.3g} {name}" if number < 100 * unit else f"{number / unit:,.0f} {name}"
    return f"{number:,}"
