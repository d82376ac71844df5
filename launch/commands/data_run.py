"""`steppe data mix`, `consumed` and `show RUN`: what a run reads, has read and will read."""

import json
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.commands.train import Overrides

if TYPE_CHECKING:
    from pretrain.ledger import Ledger, SampleContent, StepData
    from pretrain.run_dir import RunDir

EXCERPT_CHARACTERS = 160
MOST = 10**15
"""Steps or tokens that a command takes: beyond any run, and positions still fit 64 bits."""

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def mix(
    run_dir: Run,
    at_step: Annotated[int | None, typer.Option(min=0, max=MOST, help="The stage begins after so many steps.")] = None,
    at_tokens: Annotated[int | None, typer.Option(min=0, max=MOST, help="Or after so many tokens.")] = None,
    overrides: Overrides = [],  # noqa: B006
    drop: Annotated[bool, typer.Option("--drop", help="Take away the stage that begins there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Record a new stage of a run's data: --set weights.NAME=W, sequence_length=T, global_batch_size=B.

    What is not named stays; weights.NAME=null takes a source out; a stage that begins there already is changed. The
    next `steppe resume` reads by it.
    """
    from launch.mixing import mixed
    from launch.run_folder import locked
    from pretrain.run_dir import RunDir

    if at_step is not None and at_tokens is not None:
        raise ValueError(
            f"--at-step {at_step} and --at-tokens {at_tokens}: a stage has one beginning, give one of them"
        )
    if at_step is None and at_tokens is None:
        raise ValueError("when does the stage begin? give --at-step N or --at-tokens N")
    unit, begin = ("step", at_step) if at_step is not None else ("tokens", at_tokens)
    assert begin is not None
    run = RunDir(run_dir.resolve())
    change = mixed(run, unit, begin, overrides, drop)
    with locked(run):
        change.make(say=False)  # the stages are shown, rather
    with closing(_ledger(run)) as ledger:
        stages = [stage.as_event() for stage in ledger.stages]
        if as_json:
            print(json.dumps({"path": str(run_dir), "stages": stages, **_consumption(ledger, None)}))
            return
        end = ledger.end()
        for stage in ledger.stages:
            late = "" if stage.begin.step < end.step else f" (after the end of the run, step {end.step})"
            print(f"{stage.in_words()}{late}", file=sys.stderr)
        _print_consumption(ledger, None)


def consumed(
    run_dir: Run,
    at_step: Annotated[
        int | None, typer.Option(min=0, max=MOST, help="After this step [default: the newest checkpoint].")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tokens and epochs of each source that a run has read, and will have read at its end."""
    with closing(_ledger(_run(run_dir))) as ledger:
        if as_json:
            print(json.dumps({"path": str(run_dir), **_consumption(ledger, at_step)}))
        else:
            _print_consumption(ledger, at_step)


def show_step(
    run_dir: Path, step: int | None, rank: int | None, ranks: int | None, full_text: bool, as_json: bool
) -> None:
    """The documents of one step's batch: source, document, where it came from, which of its tokens, and their text.

    Raises ValueError where the run, the step or the rank is none.
    """
    import numpy as np

    from data_pipeline.tokenizer import Tokenizer

    run = _run(run_dir)
    if step is None:
        raise ValueError("which step of the run? give --step N, the first being 1")
    if not 1 <= step <= MOST:
        raise ValueError(f"--step {step}: name a step of {run_dir}, from 1 to {MOST}, the first being 1")
    if ranks is not None and ranks < 1:
        raise ValueError(f"--ranks {ranks}: give a number of ranks, 1 or more")
    with closing(_ledger(run)) as ledger:
        batch = ledger.step(step)
        positions = np.arange(batch.first, batch.first + batch.size)
        if rank is not None:
            positions = positions[_share_of_rank(ledger, run, batch, rank, ranks)]
        decode = Tokenizer(run.tokenizer_path).decode
        samples = (_sample(sample, decode) for sample in ledger.samples(positions))
        place = {"step": step, "position": batch.first, "samples": batch.size}
        stage = {"sequence_length": batch.stage.sequence_length, "weights": batch.stage.weights}
        if as_json:
            print(json.dumps({"path": str(run_dir), **place, **stage, "content": list(samples)}))
            return
        length = stage["sequence_length"]
        print(f"step {step}: {batch.size} samples of up to {length:,} tokens, from position {batch.first:,} on")
        for sample in samples:
            _print_sample(sample, full_text)


def _run(run_dir: Path) -> "RunDir":
    from launch.run_folder import check_run
    from pretrain.run_dir import RunDir

    run = RunDir(run_dir.resolve())
    check_run(run)
    return run


def _ledger(run: "RunDir") -> "Ledger":
    """Raises ValueError if the data is not what the run reads."""
    from launch.run_checks import check_same_data, fingerprints
    from pretrain.ledger import Ledger
    from pretrain.run_dir import read_json

    ledger = Ledger.of_run(run)
    check_same_data(read_json(run.data_path), fingerprints(ledger.config, ledger.manifests), [])
    return ledger


def _share_of_rank(ledger: "Ledger", run: "RunDir", batch: "StepData", rank: int, ranks: int | None) -> slice:
    """Which of a batch's samples a rank reads."""
    from pretrain.layout import Layout, check_layout
    from pretrain.run_dir import read_json

    if ranks is None:
        if not run.environment_path.is_file():
            raise ValueError(f"{run.path} has not been trained yet, so its ranks are not known: give --ranks N")
        ranks = int(read_json(run.environment_path)["ranks"])
    if not 0 <= rank < ranks:
        raise ValueError(f"--rank {rank}: there are {ranks} ranks, 0 to {ranks - 1}")
    check_layout(ledger.config, ranks)
    layout = Layout.of(ledger.config, ranks)
    share = batch.size // layout.data
    data_rank = rank // ledger.config.parallel.ranks_per_sample
    return slice(data_rank * share, (data_rank + 1) * share)


def _sample(sample: "SampleContent", decode: Any) -> dict[str, Any]:
    documents = [
        {
            "document": part.document,
            "file": part.file,
            "index": part.index,
            "start": part.start,
            "tokens": len(part.tokens),
            "document_tokens": part.document_tokens,
            "text": decode(part.tokens),
        }
        for part in sample.parts
    ]
    return {"position": sample.position, "source": sample.source, "epoch": sample.epoch, "documents": documents}


def _print_sample(sample: dict[str, Any], full_text: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    head = f"\nsample {sample['position']:,}  {sample['source']}, epoch {sample['epoch']}"
    console.print(Text(head, style="bold"))
    for part in sample["documents"]:
        origin = "" if part["file"] is None else f", {part['file']} #{part['index']}"
        end = part["start"] + part["tokens"]
        where = f"tokens {part['start']:,} to {end - 1:,} of {part['document_tokens']:,}"
        console.print(Text(f"  document {part['document']:,}{origin}: {where}", style="dim"))
        text = part["text"] if full_text else " ".join(part["text"].split())
        cut = "" if full_text or len(text) <= EXCERPT_CHARACTERS else " ..."
        console.print(Text(f"    {text if full_text else text[:EXCERPT_CHARACTERS]}{cut}"))


def _consumption(ledger: "Ledger", at_step: int | None) -> dict[str, Any]:
    """By source what was read up to a step, and what will have been at the end."""
    here = ledger.state.place if at_step is None else ledger.place(at_step)
    end = ledger.end()
    places = {"now": here, "end": end if end.step >= here.step else here}
    return {
        when: {
            **asdict(place),
            "sources": {
                name: {**asdict(count), "source_tokens": ledger.source_tokens.get(name)}
                for name, count in ledger.consumed(place).items()
            },
        }
        for when, place in places.items()
    }


def _print_consumption(ledger: "Ledger", at_step: int | None) -> None:
    from rich.console import Console
    from rich.table import Table

    counts = _consumption(ledger, at_step)
    now, end = counts["now"]["step"], counts["end"]["step"]
    table = Table(title=f"read after step {now:,}, and at the end, step {end:,}", title_justify="left")
    table.add_column("source")
    for header in ("tokens", "read", "share", "epochs", "at the end", "share", "epochs"):
        table.add_column(header, justify="right")
    for name, tokens in ledger.source_tokens.items():
        cells = []
        for when in ("now", "end"):
            sources = counts[when]["sources"]
            total = sum(source["tokens"] for source in sources.values()) or 1
            source = sources.get(name, {"tokens": 0, "epochs": 0.0})
            cells += [f"{source['tokens']:,}", f"{100 * source['tokens'] / total:.1f} %", f"{source['epochs']:.3f}"]
        table.add_row(name, f"{tokens:,}", *cells)
    Console().print(table)
