"""`steppe bench train --ranks N`: Steppe on several ranks of this machine beside itself on one.

A rank more cannot bring more than the machine has to give: cores share memory's bandwidth, caches and clocks. So the
gain is compared with that of as many single ranks side by side, each on its share of the cores, that never talk.
"""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.config import RunConfig

MODULE = "launch.bench.train_contender"
WHAT = {
    "ranks": "{ranks} ranks, ZeRO {zero_stage}, {share} of {threads} threads each, bound to their shares of the cores",
    "apart": "the same without communication: as many runs of one rank side by side, the limit of these cores",
    "one-share": "the first of these while the others rest: one rank alone on such a share of the cores",
    "one-all": "one rank with all threads",
}


def run_ranks(recipe: str, config: "RunConfig", ranks: int, rounds: int, steps: int) -> dict[str, Any]:
    """Measure; returns what `--json` prints. A step takes one micro-batch of each rank.

    config: of all ranks together. Raises ValueError if there is not a core for each.
    """
    from launch.bench.data_tables import say
    from launch.bench.train import UNMEASURED_STEPS, WARM_UP_STEPS
    from launch.bench.train_job import Job
    from launch.bench.turns import Contender, Place, Spread, Team, check_cores, free_port, ratios, take_turns
    from pretrain.host_memory import malloc_environment

    threads = len(os.sched_getaffinity(0))
    check_cores(ranks)
    share, port = threads // ranks, free_port()
    together = [Place(rank, ranks, rank, ranks, bound=True, port=port) for rank in range(ranks)]
    apart = [Place(local_rank=rank, local_world=ranks, bound=True) for rank in range(ranks)]
    one_batch = config.batch.model_copy(update={"global_batch_size": config.batch.micro_batch_size})
    alone = config.model_copy(update={"batch": one_batch})
    runs = {
        "ranks": (config, together, share),
        "apart": (alone, apart, share),
        "one-all": (alone, [Place()], threads),
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steppe-bench-")))
        teams = {}
        for name, (of_run, places, threads_each) in runs.items():
            say(f"building {name}")
            path = folder / f"{name}.json"
            path.write_text(Job(config=of_run).model_dump_json(), encoding="utf-8")
            arguments = ["steppe", str(path)]
            members = [
                stack.enter_context(
                    Contender(name, MODULE, arguments, threads_each, at, malloc_environment(os.environ))
                )
                for at in places
            ]
            built = [member.built() for member in members]
            teams[name] = Team(name, members)
        teams["one-share"] = Team("one-share", teams["apart"].members[:1])
        order = [teams[name] for name in WHAT]
        warm_up = take_turns(order, 1, {"steps": WARM_UP_STEPS}, lambda name, number: say(f"warming up: {name}"))
        answers = take_turns(
            order,
            rounds,
            {"steps": steps, "unmeasured": UNMEASURED_STEPS},
            lambda name, number: say(f"round {number + 1}/{rounds}: {name}"),
        )
    warm_up["one-share"] = warm_up["apart"]  # whose process it shares, and so its first step
    tokens = config.data.sequence_length * config.batch.micro_batch_size * steps
    speeds = {
        name: [len(turn["members"]) * tokens / max(rank["seconds"] for rank in turn["members"]) for turn in turns]
        for name, turns in answers.items()
    }
    words = {"ranks": ranks, "zero_stage": config.parallel.zero_stage, "share": share, "threads": threads}
    return {
        "recipe": recipe,
        "model": config.model.model_dump(mode="json"),
        "sequence_length": config.data.sequence_length,
        "micro_batch_size": config.batch.micro_batch_size,
        **words,
        "torch": built[0]["torch"],
        "rounds": rounds,
        "steps": steps,
        "settings": {
            name: {
                "what": WHAT[name].format(**words),
                "tokens_per_second": Spread.of(speeds[name]).as_dict(),
                "tokens_per_second_by_round": speeds[name],
                "peak_memory_bytes": [
                    max(turn["members"][rank]["peak_memory_bytes"] for turn in turns)
                    for rank in range(len(turns[0]["members"]))
                ],
                "loss_at_first_step": warm_up[name][0]["members"][0]["losses"][0],
                "loss_at_end": turns[-1]["members"][0]["losses"][-1],
            }
            for name, turns in answers.items()
        },
        "gains": {name: ratios(speeds[name], speeds["one-share"]).as_dict() for name in WHAT},
        "ranks/apart": ratios(speeds["ranks"], speeds["apart"]).as_dict(),
        "ranks/one-all": ratios(speeds["ranks"], speeds["one-all"]).as_dict(),
    }


def print_ranks(result: dict[str, Any]) -> None:
    """The speeds, and how much of what the cores allow the ranks reach."""
    from launch.bench.train_table import console, print_lines, table_of
    from launch.bench.turns import Spread

    table = table_of(
        f"{result['recipe']}: sequences of {result['sequence_length']}, {result['micro_batch_size']} a step and rank, "
        f"torch {result['torch']}",
        "setting",
        ("tokens/s", "min to max", "of one-share", "min to max", "GB a rank"),
    )
    for name, setting in result["settings"].items():
        speed, gain = Spread(**setting["tokens_per_second"]), Spread(**result["gains"][name])
        table.add_row(
            name,
            f"{speed.median:,.0f}",
            f"{speed.min:,.0f} to {speed.max:,.0f}",
            f"{gain.median:.3f}",
            f"{gain.min:.3f} to {gain.max:.3f}",
            f"{max(setting['peak_memory_bytes']) / 1e9:.2f}",
        )
    to = console()
    to.print(table)
    of_apart, of_all = Spread(**result["ranks/apart"]), Spread(**result["ranks/one-all"])
    print_lines(
        to,
        [
            *(f"{name}: {setting['what']}" for name, setting in result["settings"].items()),
            f"{result['ranks']} ranks reach {of_apart.median:.1%} ({of_apart.min:.1%} to {of_apart.max:.1%}) of what "
            f"their cores do apart, and {of_all.median:.3f} times the speed of one rank with all threads "
            f"({of_all.min:.3f} to {of_all.max:.3f}).",
            f"{result['rounds']} rounds of {result['steps']} steps in alternating order, a step before each that does "
            "not count.",
        ],
    )
