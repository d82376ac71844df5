"""`steppe bench eval`: tokens/s of perplexity and memory, in turn with peers on the same model and text."""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from launch.bench.data_tables import at_least, in_words, print_part, say, without_missing

if TYPE_CHECKING:
    from launch.bench.turns import Contender

CONTENDERS = {
    "steppe": "`steppe eval`: tokenizes, scores and records each document; windows of like length share a batch",
    "transformers": "the plain loop of its guide to perplexity, one window at a time, with the same targets",
    "lm-eval": "lm-eval's `hf`, loglikelihood_rolling, its default of a window at a time",
    "lm-eval-8": "the same, eight windows at a time",
}
PEERS = tuple(name for name in CONTENDERS if name != "steppe")
NEEDED = {"lm-eval": ("lm_eval",), "lm-eval-8": ("lm_eval",)}
WORKS = {
    "documents": "whole documents, windows side by side",
    "strided": "the same documents, every window half over the one before",
    "paragraphs": "their paragraphs, each a document of its own",
}
SAME_LOSS = {"transformers": 2e-3, "lm-eval": 2e-2, "lm-eval-8": 2e-2}  # bf16 rounds; lm-eval scores no EOS
OF_THE_LOOP = 1.5
PARAGRAPHS = re.compile(r"\n\s*\n")


def evaluation(
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face folder. By default a recipe's shape with initial weights.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="The recipe whose shape is taken.")] = "58m",
    inputs: Annotated[
        list[str], typer.Option("--input", help="File or folder of text; may be repeated. By default Python's sources.")
    ] = [],  # noqa: B006
    text_kb: Annotated[int, typer.Option(min=1, help="Text of a turn, in kB.")] = 64,
    window: Annotated[int, typer.Option(min=2, help="Tokens the model sees at once.")] = 512,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of weights and forward pass.")] = "bf16",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 5,
    peers: Annotated[
        list[str],
        typer.Option("--peer", help=f"Whom to compare with, of {', '.join(PEERS)}; may be repeated. All by default."),
    ] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Tokens/s and peak memory of perplexity on this machine, in turn with transformers in a plain loop and lm-eval's
    `hf` on the same model and text. Peers that are not installed are left out, and named."""
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"--peer {peer} is not known: choose from {', '.join(PEERS)}")
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as scratch:
        result = run(model, recipe, inputs, text_kb * 1000, window, precision, rounds, peers, Path(scratch))
    if as_json:
        print(json.dumps(result))
    else:
        print_tables(result)


def run(
    model: Path | None,
    recipe: str,
    inputs: Sequence[str],
    text_bytes: int,
    window: int,
    precision: str,
    rounds: int,
    peers: Sequence[str],
    scratch: Path,
) -> dict[str, Any]:
    """Measure; returns what `--json` prints.

    Raises ValueError if the model or an input is not usable, RuntimeError if a peer did other work than ours.
    """
    from launch.bench.data_text import read_texts
    from launch.bench.turns import Contender

    if model is not None and not (model / "config.json").is_file():
        raise ValueError(f"--model {model} is no Hugging Face folder (config.json): name one, or a recipe by --recipe")
    names, left_out = without_missing(
        {name: NEEDED.get(name, ()) for name in CONTENDERS if name == "steppe" or not peers or name in peers}
    )
    say("collecting text")
    what, texts = read_texts(inputs)
    folder = model or recipe_folder(recipe, texts, window, scratch / "model")
    documents = some_of(texts, text_bytes)
    paragraphs = some_of((part for text in documents for part in PARAGRAPHS.split(text) if part.strip()), text_bytes)
    by_work = {"documents": documents, "strided": documents, "paragraphs": paragraphs}
    works = {name: {"window": window, "stride": window // 2 if name == "strided" else window} for name in WORKS}
    texts_path, job_path = scratch / "texts.json", scratch / "job.json"
    texts_path.write_text(json.dumps(by_work), encoding="utf-8")
    job = {"model": str(folder), "precision": precision, "texts": str(texts_path), "works": works}
    job_path.write_text(json.dumps(job), encoding="utf-8")
    threads = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        hosts, built = [], {}
        for name in names:
            say(f"building {name}")
            host = Contender(name, "launch.bench.evaluation_contender", [name, str(job_path)], threads)
            hosts.append(stack.enter_context(host))
            built = host.built()
        measured = {name: _measure(name, works[name], hosts, rounds) for name in works}
    return {
        "model": recipe if model is None else str(model),
        "text": what,
        "precision": precision,
        "threads": threads,
        "torch": built["torch"],
        "rounds": rounds,
        "left_out": left_out,
        "works": {
            name: {"what": WORKS[name], "documents": len(by_work[name]), **works[name], **measured[name]}
            for name in works
        },
    }


def _measure(work: str, cut: dict[str, int], hosts: Sequence["Contender"], rounds: int) -> dict[str, Any]:
    """One kind of work, by all who can do it."""
    from launch.bench.turns import Spread, ratios, take_turns

    able = [host for host in hosts if cut["stride"] == cut["window"] or not host.name.startswith("lm-eval")]
    warm_up = take_turns(able, 1, {"work": work}, lambda name, number: say(f"{work}, warming up: {name}"))
    losses = {name: turns[0]["nats"] / turns[0]["targets"] for name, turns in warm_up.items()}
    check_same_work(losses)
    answers = take_turns(
        able, rounds, {"work": work}, lambda name, number: say(f"{work}, round {number + 1}/{rounds}: {name}")
    )
    targets = answers["steppe"][0]["targets"]
    speeds = {name: [targets / turn["seconds"] for turn in turns] for name, turns in answers.items()}
    faster = {name: ratios(speeds["steppe"], speed) for name, speed in speeds.items() if name != "steppe"}
    loop = faster.get("transformers")
    return {
        "tokens": targets,
        "contenders": {
            name: {
                "what": CONTENDERS[name],
                "tokens_per_second": Spread.of(speeds[name]).as_dict(),
                "tokens_per_second_by_round": speeds[name],
                "peak_memory_bytes": max(turn["peak_memory_bytes"] for turn in answers[name]),
                "loss": losses[name],
            }
            for name in speeds
        },
        "ratios": {f"steppe/{name}": ratio.as_dict() for name, ratio in faster.items()},
        "targets": [] if loop is None else [at_least(f"{work}: Steppe / the plain loop", OF_THE_LOOP, loop)],
    }


def recipe_folder(recipe: str, texts: Sequence[str], window: int, out: Path) -> Path:
    """A Hugging Face folder of a recipe's shape with its initial weights, and a tokenizer trained on the text."""
    import torch
    from safetensors.torch import save_file

    from launch.bench.contenders import check_transformers
    from launch.bench.data_text import train
    from launch.run_folder import recipe_path
    from pretrain.engine import build_decoder
    from pretrain.hf import config_to_hf
    from pretrain.hf_folder import SINGLE_NAME
    from pretrain.hf_tokenizer import write_fast_tokenizer
    from pretrain.hf_weights import weights_to_hf
    from pretrain.recipe import load_config
    from pretrain.run_dir import write_json

    overrides = [
        f"data={{sequence_length: {window}, sources: [{{name: bench, path: none}}]}}",
        "evaluation={every_steps: 0}",
    ]
    config = load_config(recipe_path(recipe), overrides)
    check_transformers(config.model, "choose another recipe")
    out.mkdir()
    tokenizer = out.parent / "tokenizer.model"
    say(f"training a tokenizer of {config.model.vocab_size:,} pieces")
    train(texts, config.model.vocab_size, tokenizer)
    write_fast_tokenizer(tokenizer, out, window)
    write_json(out / "config.json", config_to_hf(config.model, window))
    weights = build_decoder(config, torch.get_default_device(), torch.float32).state_dict()
    hf = weights_to_hf(weights, config.model)
    save_file({name: weight.contiguous() for name, weight in hf.items()}, out / SINGLE_NAME)
    return out


def some_of(texts: Iterable[str], text_bytes: int) -> list[str]:
    """About so many bytes of them: documents from all over, in their order, the last one cut."""
    known = list(texts)
    total = sum(len(text.encode()) for text in known)
    step = max(1, total // text_bytes)
    chosen, left = [], text_bytes
    for text in (text for start in range(step) for text in known[start::step]):
        if left <= 0:
            break
        piece = text.encode()[:left].decode("utf-8", "ignore")
        chosen.append(piece)
        left -= len(piece.encode()) or left
    return chosen


def check_same_work(losses: dict[str, float]) -> None:
    """Raise RuntimeError unless all peers have our loss."""
    for name, loss in losses.items():
        if not abs(loss - losses["steppe"]) <= SAME_LOSS.get(name, 0.0) * losses["steppe"]:
            raise RuntimeError(
                f"{name} has a loss of {loss:.4f} where ours is {losses['steppe']:.4f}: it is not the same work, and "
                "its speed says nothing"
            )


def print_tables(result: dict[str, Any]) -> None:
    """A table for each kind of work."""
    where = f"{result['model']} in {result['precision']}; {result['text']}; {result['threads']} threads, torch"
    note = (
        f"{where} {result['torch']}; medians (min-max) of {result['rounds']} alternating rounds; memory is the peak of "
        "a process over all tables"
    )
    for name, work in result["works"].items():
        rows = []
        for contender, its in work["contenders"].items():
            ratio = work["ratios"].get(f"steppe/{contender}")
            memory, loss = f"{its['peak_memory_bytes'] / 1e9:.2f} GB", f"{its['loss']:.4f}"
            speed = in_words(its["tokens_per_second"], 0)
            rows.append([contender, speed, in_words(ratio, 2) if ratio else "", memory, loss])
        print_part(
            f"{name}: {work['what']}; {work['documents']:,} of them, {work['tokens']:,} targets, window "
            f"{work['window']}, stride {work['stride']}",
            ("", "tokens/s", "Steppe / it", "memory", "loss"),
            rows,
            {contender: its["what"] for contender, its in work["contenders"].items()},
            note,
            {"left_out": result["left_out"], "targets": work["targets"]},
        )
