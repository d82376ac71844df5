"""Loading in `steppe bench data`: tokens/s of batches out of a data folder, in turn with peers on the same tokens."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from launch.bench.data_tables import at_least, in_words, print_part, say, without_missing
from launch.bench.turns import Contender, Spread, ratios, take_turns

CONTENDERS = {
    "limit": "random windows of T + 1 tokens copied out of mapped memory by plain array slices, as they are stored: "
    "no batches",
    "memmap": "random windows out of np.memmap as it is, made into inputs and targets; nothing is verified, a window "
    "comes as often as chance has it",
    "steppe": "the Loader: exact order, every 64 KiB block verified when it is first touched, batches made in a "
    "thread; one micro-batch a step",
    "steppe-8": "the same with 8 micro-batches a step",
    "steppe-mask": "as steppe, with intra-document masks: positions and document numbers, no target after an EOS",
    "steppe-best-fit": "as steppe, with packing: best_fit",
    "steppe-best-fit-mask": "the same with intra-document masks",
    "litdata-0": "TokensLoader, shuffled, in process",
    "litdata-2": "the same with 2 workers",
    "datasets": "rows in arrow files, shuffled, as numpy arrays, in process",
}
NEEDED = {"litdata-0": ("litdata",), "litdata-2": ("litdata",), "datasets": ("datasets",)}
OF_MEMMAP = 0.5
LEAST_STEPS = 4  # of 8 micro-batches


def run(
    tokens: int,
    sequence_length: int,
    micro_batch_size: int,
    seconds: float,
    rounds: int,
    scratch: Path,
) -> dict[str, Any]:
    """Measure; returns what `--json` prints.

    Args:
        tokens: of the data folder that is made for it.
        sequence_length: T.
        micro_batch_size: rows of a batch.
        seconds: of a turn, which ends with the epoch at the latest.
        rounds: turns of each contender.
        scratch: a folder to work in.

    Raises:
        ValueError: the tokens are too few for a step.
    """
    from launch.bench.data_tokens import write_tokens

    least = LEAST_STEPS * 8 * sequence_length * micro_batch_size
    if tokens < least:
        raise ValueError(
            f"--tokens {tokens} are too few for {LEAST_STEPS} steps of each contender: give at least {least}"
        )
    names, left_out = without_missing({name: NEEDED.get(name, ()) for name in CONTENDERS})
    say(f"writing {tokens / 1e6:,.1f} M tokens")
    manifest = write_tokens(scratch / "tokens", tokens, sequence_length)
    work = [
        str(scratch / "tokens"),
        str(scratch),
        str(sequence_length),
        str(micro_batch_size),
    ]
    with ExitStack() as stack:
        contenders = []
        for name in names:
            say(f"building {name}")
            contender = stack.enter_context(Contender(name, "launch.bench.data_loader_contender", [name, *work], 1))
            contender.built()
            contenders.append(contender)
        take_turns(contenders, 1, {"seconds": seconds / 4}, lambda name, number: say(f"warming up: {name}"))
        answers = take_turns(
            contenders, rounds, {"seconds": seconds}, lambda name, number: say(f"round {number + 1}/{rounds}: {name}")
        )
    speeds = {name: [turn["tokens"] / turn["seconds"] for turn in turns] for name, turns in answers.items()}
    ours = {name: ratios(speeds["steppe"], speeds[name]) for name in names if name != "steppe"}
    (pack,) = manifest.packs
    return {
        "tokens": manifest.tokens,
        "documents": manifest.documents,
        "sequence_length": sequence_length,
        "micro_batch_size": micro_batch_size,
        "best_fit_padding": pack.padding_tokens / (pack.samples * sequence_length),
        "seconds": seconds,
        "rounds": rounds,
        "contenders": {
            name: {
                "what": CONTENDERS[name],
                "tokens_per_second": Spread.of(speeds[name]).as_dict(),
                "tokens_per_second_by_round": speeds[name],
                "first_batch_seconds": Spread.of([turn["first_batch_seconds"] for turn in turns]).as_dict(),
            }
            for name, turns in answers.items()
        },
        "ratios": {f"steppe / {name}": spread.as_dict() for name, spread in ours.items()},
        "left_out": left_out,
        "targets": [
            at_least("tokens/s of steppe / memmap", OF_MEMMAP, ours["memmap"]),
            *(at_least(f"tokens/s of steppe / {name}", 1.0, ours[name]) for name in names if name in NEEDED),
        ],
    }


def print_table(result: dict[str, Any]) -> None:
    """What `run` returned."""
    rows = []
    for name, contender in result["contenders"].items():
        speed = {key: value / 1e6 for key, value in contender["tokens_per_second"].items()}
        ratio = result["ratios"].get(f"steppe / {name}")
        first = contender["first_batch_seconds"]
        rows.append([name, in_words(speed, 1), in_words(ratio, 2) if ratio else "", f"{first['median']:.3f}"])
    print_part(
        f"Loading: batches of {result['micro_batch_size']} x {result['sequence_length']} out of "
        f"{result['tokens'] / 1e6:,.0f} M tokens (uint16, {result['documents']:,} random documents, page cache)",
        ("loader", "M tokens/s", "steppe / it", "first batch, s"),
        rows,
        {name: contender["what"] for name, contender in result["contenders"].items()},
        f"{result['rounds']} rounds of {result['seconds']:g} s in alternating order, each reading anew; medians "
        "(min-max), ratios round by round. Batches are inputs and targets, int64, but for the limit. Padding counts "
        f"as tokens: {result['best_fit_padding']:.2%} of best_fit. First batch: from nothing but the loaded "
        "libraries.",
        result,
    )
