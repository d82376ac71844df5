"""What `steppe bench train` prints."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from launch.bench.contenders import COMPILED, EAGER
from launch.bench.turns import Spread

WIDEST = 1000


def table_of(title: str, first: str, headers: tuple[str, ...]) -> Table:
    """An empty one: a column of names, and numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def console() -> Console:
    """Stdout, for tables as wide as they need to be: a terminal that is narrower breaks their lines, and no digit is
    lost."""
    return Console(width=WIDEST)


def print_lines(to: Console, lines: list[str]) -> None:
    """Plain sentences, a line each."""
    for line in lines:
        to.print(line, highlight=False, soft_wrap=True, markup=False)


def print_table(result: dict[str, Any]) -> None:
    """The speeds, what each contender is, the limit's parts and DeepSpeed's overhead."""
    owners = [own for own in ("steppe", COMPILED) if own in result["contenders"]]
    rivals = [header for own in owners for header in (f"{own} / it", "min to max")]
    table = table_of(
        f"{result['recipe']}: sequences of {result['sequence_length']}, {result['micro_batch_size']} a step, "
        f"ZeRO {result['zero_stage']}, {result['threads']} threads, torch {result['torch']}",
        "contender",
        ("tokens/s", "min to max", *rivals, "GB", "of eager", "first loss"),
    )
    for name, contender in result["contenders"].items():
        speed = Spread(**contender["tokens_per_second"])
        of_eager = contender["peak_memory_of_eager"]
        table.add_row(
            name,
            f"{speed.median:,.0f}",
            f"{speed.min:,.0f} to {speed.max:,.0f}",
            *(cell for own in owners for cell in _in_cells(result["ratios"].get(f"{own}/{name}"))),
            f"{contender['peak_memory_bytes'] / 1e9:.2f}",
            "" if of_eager is None else f"{of_eager:.2f}",
            f"{contender['loss_at_first_step']:.4f}",
        )
    limit = result["limit"]
    reached = (cell for own in owners for cell in _in_cells(limit["reached"][own]))
    table.add_row("limit", f"{limit['tokens_per_second']:,.0f}", "", *reached, "", "", "")
    to = console()
    to.print(table)
    print_lines(to, [f"{name}: {_in_words(contender)}" for name, contender in result["contenders"].items()])
    print_lines(to, [f"without {name}: {why}" for name, why in result["left_out"].items()])
    print_lines(to, [_limit_in_words(limit), *_overhead_in_words(result["overhead"])])
    print_lines(
        to,
        [
            f"{result['rounds']} rounds of {result['steps']} steps in alternating order, a step before each that does "
            f"not count, gradients clipped to {result['grad_clip']:g}; models of the same shape have the same initial "
            "weights, and all the same random tokens; memory is the peak of each process, also as a share of "
            f"{EAGER}'s; "
            + ("all keep the memory that they free." if result["keep_memory"] else "Steppe alone keeps what it frees.")
        ],
    )


def _in_cells(ratio: dict[str, float] | None) -> tuple[str, str]:
    """Median, and extremes."""
    return ("", "") if ratio is None else (f"{ratio['median']:.2f}", f"{ratio['min']:.2f} to {ratio['max']:.2f}")


def _in_words(contender: dict[str, Any]) -> str:
    """What one is, on a line."""
    active, total = contender["active_parameters"], contender["total_parameters"]
    words = [contender["what"], f"{active:,} parameters" + (f" active of {total:,}" if active != total else "")]
    if "hidden_size" in contender:
        words.append(f"{contender['hidden_size']} wide")
    if "class" in contender:
        words.append(contender["class"])
    if "experts" in contender:
        seconds = contender["forward_backward_seconds_by_experts"].items()
        tried = ", ".join(f"{name} {value:.2f} s" for name, value in seconds)
        words.append(f"experts_implementation={contender['experts']}, the fastest (forward and backward: {tried})")
    return "; ".join(words)


def _limit_in_words(limit: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in limit["seconds_a_step"].items())
    return (
        f"limit: this step's own operations, each timed alone in steppe's process: {parts}, in all "
        f"{sum(limit['seconds_a_step'].values()):.3f} s; of it "
        + " and ".join(
            f"{own} reaches {of['median']:.1%} ({of['min']:.1%} to {of['max']:.1%})"
            for own, of in limit["reached"].items()
        )
    )


def _overhead_in_words(overhead: dict[str, Any] | None) -> list[str]:
    if overhead is None:
        return []
    low, median, high = (overhead["of_bare"][name] - 1 for name in ("min", "median", "max"))
    lines = [
        f"DeepSpeed: the time of steppe's step is the bare loop's and {median:+.1%} ({low:+.1%} to {high:+.1%}; aim: "
        f"{overhead['aim'] - 1:+.0%})"
    ]
    if items := overhead["operators"]:
        words = [f"{item['operator']} {item['seconds'] * 1e3:.0f} ({item['calls']:+.0f})" for item in items]
        lines.append(f"profiled, milliseconds a step (and calls) beyond the bare loop's: {', '.join(words)}")
    return lines
