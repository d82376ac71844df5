"""`steppe generate`: text from a model."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from launch.out_files import check_out_files, encodable, write_out_file
from launch.prompts import read_prompts
from launch.step_word import HELP as STEP_HELP
from launch.step_word import step_of_word
from pretrain.generation.options import GenerationOptions

if TYPE_CHECKING:
    from pretrain.generation.generate import Generation

PROGRESS_SECONDS = 10.0


def generate(
    model: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a Hugging Face folder.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A text to continue, taken as it is; one or more.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 file that is the prompt.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A JSON object a line, with the prompt in its field prompt or text.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop here, if nothing has ended the text before.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: the most probable token each time.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many tokens, the most probable ones.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the most probable tokens that add up to this probability.")
    ] = None,
    beams: Annotated[int, typer.Option(help="2 or more: beam search, with so many texts side by side.")] = 1,
    length_penalty: Annotated[
        float, typer.Option(help="Of beam search: above 0 favours long texts, below 0 short ones.")
    ] = 1.0,
    early_stopping: Annotated[
        bool, typer.Option("--early-stopping", help="End a beam search once as many texts as beams have ended.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the draws, at a temperature above 0.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the text; one or more.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Prompts at a time, default 8. Keys and values of all tokens of each beam stay in memory."),
    ] = None,
    step: Annotated[str | None, typer.Option(help=STEP_HELP)] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="The model's own, if not beside it.")] = None,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of weights and forward pass.")] = "fp32",
    offload: Annotated[
        Literal["cpu", "disk"] | None, typer.Option(help="Where weights are that do not compute just now.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write one JSON object a prompt to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Continue a prompt; prints the prompt and, as it is written, what the model writes after it."""
    texts = read_prompts(prompt, prompt_file, prompts)
    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        beams=beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        seed=seed,
        stop=tuple(stop or ()),
    )
    at_step = step_of_word(step)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"--batch-size {batch_size} must be at least 1")
    check_out_files({"--out": out})

    import torch

    from pretrain.generation.generate import generate as write
    from pretrain.generation.ids import BATCH_SIZE
    from pretrain.load_model import load_model

    loaded = load_model(model, at_step, tokenizer, torch.bfloat16 if precision == "bf16" else torch.float32, offload)
    for reason in loaded.passed_over:
        print(f"steppe: passed over: {reason}", file=sys.stderr)
    for note in loaded.notes:
        print(f"steppe: note: {note}", file=sys.stderr)
    streaming = len(texts) == 1 and out is None and not as_json
    if streaming:
        unsaid = list(texts)  # the prompt, which is not said before it is known to be accepted

        def say(_: int, text: str) -> None:
            _print_now("".join([*unsaid, text]))
            unsaid.clear()

        write(loaded, texts, options, say)
        say(0, "\n")
        return
    progress = _Progress(len(texts))
    generations = write(loaded, texts, options, progress.begun, batch_size or BATCH_SIZE)
    if out is not None:
        write_out_file(out, "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in generations))
        print(f"steppe: {len(texts):,} continuations in {out}", file=sys.stderr)
    if as_json:
        print(json.dumps(_result(loaded.name, loaded.step, precision, offload, options, generations)))
    elif out is None:
        for place, each in enumerate(generations, 1):
            _print_now(f"===== prompt {place:,} of {len(texts):,} =====\n{each.prompt}{each.text}\n")


def _result(
    model: str,
    step: int | None,
    precision: str,
    offload: str | None,
    options: GenerationOptions,
    generations: "list[Generation]",
) -> dict[str, Any]:
    """What --json prints. The only one of a prompt is there without its list, too."""
    only = asdict(generations[0]) if len(generations) == 1 else {}
    facts = {"model": model, "step": step, "precision": precision, "offload": offload, "options": asdict(options)}
    return {**facts, **only, "generations": [asdict(each) for each in generations]}


def _print_now(text: str) -> None:
    print(encodable(text, sys.stdout.encoding), end="", flush=True)


class _Progress:
    """A line on stderr now and then, while many prompts are continued."""

    def __init__(self, prompts: int) -> None:
        self._prompts, self._begun = prompts, set[int]()
        self._said = time.monotonic()

    def begun(self, prompt: int, _text: str) -> None:
        """Text has come after this prompt."""
        self._begun.add(prompt)
        if time.monotonic() - self._said >= PROGRESS_SECONDS:
            self._said = time.monotonic()
            print(
                f"steppe: {len(self._begun):,} of {self._prompts:,} prompts are being or have been continued",
                file=sys.stderr,
            )
