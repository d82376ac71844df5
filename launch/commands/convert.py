"""`steppe export` and `steppe import`: Hugging Face both ways."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from launch.step_word import HELP as STEP_HELP
from launch.step_word import step_of_word

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def export(
    model: Annotated[Path, typer.Argument(help="A run or a checkpoint.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    step: Annotated[str | None, typer.Option(help=STEP_HELP)] = None,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the weights; fp32 is exact.")] = "fp32",
    max_shard_size: Annotated[str, typer.Option(help="Of a file's tensors.")] = "5GB",
    tokenizer: Annotated[bool, typer.Option(help="Write the fast tokenizer, too.")] = True,
    check_memory: Annotated[
        str | None, typer.Option(help="What comparing the logits may take; default: what is free.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model for transformers: sharded safetensors, config, tokenizer; refused if its logits are not ours."""
    from pretrain.hf_export import export as run

    max_shard_bytes = _bytes("--max-shard-size", max_shard_size)
    memory_bytes = None if check_memory is None else _bytes("--check-memory", check_memory)
    at_step = step_of_word(step)
    with _Stages() as stages:
        result = run(model, out, at_step, dtype, max_shard_bytes, tokenizer, memory_bytes, stages.reach)
    for reason in result["passed_over"]:
        print(f"steppe: passed over: {reason}", file=sys.stderr)
    if as_json:
        print(json.dumps(result))
        return
    compared = result["comparison"]
    print(
        f"{result['path']}: {result['architecture']}, {result['parameters']:,} parameters of step {result['step']} in "
        f"{result['dtype']}, {result['bytes'] / 1e6:,.1f} MB in {_files(result['shards'])}"
    )
    print(
        f"logits equal transformers' on {compared['tokens']} tokens ({compared['mode']}; largest difference "
        f"{compared['difference']:.1e})"
    )
    if result["tokenizer"]:
        print(
            "steppe generate and eval begin with BOS, which the tokenizer leaves to you: "
            "AutoTokenizer.from_pretrained(DIR, add_bos_token=True) adds it"
        )
    else:
        print("no tokenizer was written")


def import_(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with config.json and safetensors.")],
    out: Annotated[Path, typer.Option(help="The checkpoint folder to write.")],
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint of a Hugging Face model: to evaluate, to write with, to continue pretraining from."""
    from pretrain.hf_import import import_model

    with _Stages() as stages:
        result = import_model(model, out, lambda done, total: stages.reach("importing", done, total))
    if as_json:
        print(json.dumps(result))
        return
    print(f"{result['path']}: {result['parameters']:,} parameters, context {result['sequence_length']:,} tokens")
    if not result["tokenizer"]:
        print("it has no tokenizer, for the folder has none: eval and generate need --tokenizer FILE")
    print("continue pretraining with: steppe train RECIPE", *(f"--set {shlex.quote(o)}" for o in result["set"]))


class _Stages:
    """A progress line for each stage that a conversion reports, one after the other."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._line: Any = None

    def __enter__(self) -> "_Stages":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._line is not None:
            self._line.__exit__(*exception)

    def reach(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        from launch.byte_progress import ByteProgress

        if stage != self._stage:
            self.__exit__(None, None, None)
            self._stage, self._line = stage, ByteProgress(stage, total_bytes)
            self._line.__enter__()
        self._line.reach(done_bytes)


def _bytes(flag: str, text: str) -> int:
    """`5GB`, `500 MB` or a plain number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B)?", text.strip().upper())
    if found is None:
        raise ValueError(f"{flag} {text}: expected a size such as 5GB or 500MB")
    return int(float(found.group(1)) * _UNITS[found.group(2) or "B"])


def _files(count: int) -> str:
    return f"{count} file{'s' * (count > 1)}"
