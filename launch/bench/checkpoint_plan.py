"""`steppe bench checkpoint --plan`: what the index of a large run costs the rank that writes it and those that read it.

The ranks are arithmetic: which boxes each holds is computed, and from there on it is the code of a real save and load.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.bench.turns import Contender

# Saved on so many ranks, loaded on half as many laid out like the next.
LAYOUTS = ({"zero_stage": 3, "tensor": 1}, {"zero_stage": 1, "tensor": 8})


def run(recipe: str, ranks: int, overrides: list[str]) -> dict[str, Any]:
    """Measure; returns what `--json` prints. Raises ValueError where the recipe cannot be laid out so."""
    if ranks % 2:
        raise ValueError(f"--ranks {ranks}: the checkpoint is loaded on half as many, choose an even number")
    plans = []
    for number, layout in enumerate(LAYOUTS):
        other = LAYOUTS[(number + 1) % len(LAYOUTS)]
        plans.append(_plan(recipe, ranks, overrides, layout, other))
    return {"recipe": recipe, "ranks": ranks, "plans": plans}


def _plan(
    recipe: str, ranks: int, overrides: list[str], saved: dict[str, int], loaded: dict[str, int]
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as name:
        folder = Path(name)
        writer, reader = (
            _config(recipe, ranks, overrides, saved, folder / "saved.json"),
            _config(recipe, ranks // 2, overrides, loaded, folder / "loaded.json"),
        )
        _say(f"ZeRO {saved['zero_stage']}, tensor {saved['tensor']}: what {ranks} ranks bring")
        parts = _process("parts", writer, ranks, folder)
        _say("saving on the first rank")
        save = _process("save", writer, ranks, folder)
        _say(f"loading on one of {ranks // 2} ranks, ZeRO {loaded['zero_stage']}, tensor {loaded['tensor']}")
        load = _process("load", reader, ranks // 2, folder)
    return {"saved": saved, "loaded": loaded, "loading_ranks": ranks // 2, "parts": parts, "save": save, "load": load}


def _config(recipe: str, ranks: int, overrides: list[str], layout: dict[str, int], path: Path) -> Path:
    """Write the recipe's config in this layout, with a batch that fits any."""
    from launch.run_folder import recipe_path
    from pretrain.layout import check_layout
    from pretrain.recipe import load_config

    batch = f"batch={{global_batch_size: {ranks}, micro_batch_size: 1, ramp: []}}"
    degrees = [f"parallel.{key}={value}" for key, value in layout.items()]
    config = load_config(recipe_path(recipe), [*overrides, batch, *degrees])
    check_layout(config, ranks)
    path.write_text(config.model_dump_json(), encoding="utf-8")
    return path


def _process(role: str, config: Path, ranks: int, folder: Path) -> dict[str, Any]:
    """One role in a fresh process, whose memory is its own."""
    arguments = [role, str(config), str(ranks), str(folder)]
    with Contender(role, "launch.bench.checkpoint_plan_rank", arguments, threads=1) as process:
        return process.built()


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def print_table(result: dict[str, Any]) -> None:
    """The result of `run` for a person."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    for plan in result["plans"]:
        saved, loaded, parts, save, load = (plan[key] for key in ("saved", "loaded", "parts", "save", "load"))
        brought, whole = parts["largest_part_bytes"] / 1e3, parts["parts_bytes"] / 1e6
        table = Table(
            title=f"{result['recipe']} on {result['ranks']} ranks, ZeRO {saved['zero_stage']}, tensor "
            f"{saved['tensor']}: {parts['state_bytes'] / 1e9:,.0f} GB in {parts['boxes']:,} boxes, index "
            f"{save['index_bytes'] / 1e6:.1f} MB",
            title_justify="left",
        )
        table.add_column("who")
        table.add_column("what")
        for header in ("seconds", "of CPU", "memory MB"):
            table.add_column(header, justify="right")
        who = {
            "parts": "each rank that saves",
            "save": "the first",
            "load": f"each of {plan['loading_ranks']} loading: ZeRO {loaded['zero_stage']}, tensor {loaded['tensor']}",
        }
        for role, words in who.items():
            for name, phase in plan[role]["phases"].items():
                table.add_row(words, name, *_seconds(phase), f"{phase['additional_bytes'] / 1e6:.1f}")
                words = ""
            if "peak_bytes" in plan[role]:
                phases = plan[role]["phases"].values()
                table.add_row("", "in all", *_seconds(*phases), f"{plan[role]['peak_bytes'] / 1e6:.1f}")
        console.print(table)
        console.print(
            f"A rank brings at most {brought:.1f} kB, all together {whole:.1f} MB; the rank that loads copies "
            f"{load['copies']:,} parts of boxes out of {load['files']:,} files.",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        "Memory: by how much the process's peak (VmHWM) in a phase is above what it held before.",
        highlight=False,
        soft_wrap=True,
    )


def _seconds(*phases: dict[str, float]) -> list[str]:
    """By the clock and of the processor, summed over phases."""
    return [f"{sum(phase[key] for phase in phases):.3f}" for key in ("seconds", "cpu_seconds")]
