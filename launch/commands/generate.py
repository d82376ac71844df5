"""`steppe generate`: text from a model."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a Hugging Face folder.")],
    prompt: Annotated[str | None, typer.Option(help="The text to continue, taken as it is.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 file that holds the prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop here, if EOS has not come before.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: the most probable token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws, at a temperature above 0.")] = 0,
    step: Annotated[int | None, typer.Option(help="A run's checkpoint of this step; default: the newest.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="The model's own, if not beside it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Continue a prompt; prints the prompt and what the model writes after it."""
    text = _prompt(prompt, prompt_file)
    from pretrain.generation.generate import generate as write
    from pretrain.load_model import load_model

    loaded = load_model(model, step, tokenizer)
    for reason in loaded.passed_over:
        print(f"steppe: passed over: {reason}", file=sys.stderr)
    generation = write(loaded, text, max_new_tokens, temperature, seed)
    if as_json:
        print(json.dumps({"model": loaded.name, "step": loaded.step, **asdict(generation)}))
    else:
        print(generation.prompt + generation.text)


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise ValueError("give the prompt either by --prompt TEXT or by --prompt-file FILE")
    if prompt is not None:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise ValueError("--prompt is not valid UTF-8: check the terminal's encoding, or use --prompt-file")
        return prompt
    assert file is not None
    if not file.is_file():
        raise ValueError(f"--prompt-file {file} does not exist: check the path")
    try:
        # Bytes, since reading as text would rewrite the line ends.
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {file} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
