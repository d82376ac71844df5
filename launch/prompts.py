"""The prompts of `steppe generate`, from the command line or from a file."""

import json
from pathlib import Path
from typing import Any

FIELDS = ("prompt", "text")


def read_prompts(prompt: list[str] | None, prompt_file: Path | None, prompts: Path | None) -> list[str]:
    """The texts of --prompt (one or more), --prompt-file (one), or --prompts (a JSON object a line), as they are.

    Raises ValueError unless they come from exactly one of these, and are there in UTF-8.
    """
    if sum(given is not None for given in (prompt or None, prompt_file, prompts)) != 1:
        raise ValueError("give the prompt by one of --prompt TEXT, --prompt-file FILE and --prompts FILE.jsonl")
    if prompt:
        if any("\ud800" <= letter <= "\udfff" for text in prompt for letter in text):
            raise ValueError("--prompt is not valid UTF-8: check the terminal's encoding, or use --prompt-file")
        return prompt
    if prompt_file is not None:
        return [_utf8("--prompt-file", prompt_file)]
    assert prompts is not None
    lines = _utf8("--prompts", prompts).split("\n")
    found = [_prompt_of(prompts, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"--prompts {prompts} holds no prompt: write a JSON object a line, with the field prompt")
    return found


def _utf8(option: str, file: Path) -> str:
    if not file.is_file():
        raise ValueError(f"{option} {file} does not exist: check the path")
    try:
        # Bytes, since reading as text would rewrite the line ends.
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {file} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def _prompt_of(file: Path, number: int, line: str) -> str:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"--prompts {file}:{number}: not a JSON object ({error}): write one a line") from None
    text = next((record[field] for field in FIELDS if field in record), None) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"--prompts {file}:{number}: a JSON object with a text in the field prompt or text is needed")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"--prompts {file}:{number}: half a surrogate pair is no character: correct it") from None
    return text
