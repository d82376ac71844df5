"""`steppe generate`, as a person types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from launch.commands.generate import generate
from tests.tiny_hf import tiny_hf_folder

app = typer.Typer()
app.command("generate")(generate)
PROMPT = "def f(x):\r\n    return"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_hf_folder(tmp_path_factory.mktemp("hf")))


def steppe(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_it_prints_prompt_and_text(model: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(PROMPT.encode())
    options = ("--max-new-tokens", 8, "--temperature", 0.8, "--top-k", 40, "--top-p", 0.9, "--seed", 3)
    result = json.loads(steppe(model, "--prompt", PROMPT, *options, "--json").stdout)
    assert result["prompt"] == PROMPT
    assert len(result["tokens"]) <= 8
    only = {key: result[key] for key in ("prompt", "text", "tokens", "stopped_by", "start_token")}
    assert result["generations"] == [only]
    assert (result["model"], result["step"], result["options"]["top_p"]) == (model, None, 0.9)
    plain = steppe(model, "--prompt", PROMPT, *options).stdout_bytes.decode()
    assert plain == PROMPT + result["text"] + "\n"
    from_file = steppe(model, "--prompt-file", tmp_path / "prompt.txt", *options, "--json")
    assert json.loads(from_file.stdout) == result


def test_many_prompts_go_to_a_file_or_one_object(model: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a 🙂"}\n{"text": "def f():"}\n{"prompt": ""}\n')
    given = (model, "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 5, "--batch-size", 2)
    out = tmp_path / "out.jsonl"
    to_file = steppe(*given, "--out", out)
    assert (to_file.exit_code, to_file.stdout) == (0, "")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["a 🙂", "def f():", ""]
    result = json.loads(steppe(*given, "--json").stdout)
    assert result["generations"] == lines
    assert "prompt" not in result
    shown = steppe(*given).stdout
    assert "===== prompt 2 of 3 =====\ndef f():" + lines[1]["text"] + "\n" in shown


def test_several_prompts_and_stop_strings(model: str) -> None:
    given = (model, "--prompt", "a", "--prompt", "b", "--max-new-tokens", 30, "--beams", 2, "--json")
    generations = json.loads(steppe(*given).stdout)["generations"]
    assert [each["prompt"] for each in generations] == ["a", "b"]
    stop = generations[0]["text"][2]
    stopped = json.loads(steppe(*given, "--stop", stop, "--stop", "\n").stdout)["generations"]
    assert all(stop not in each["text"] and "\n" not in each["text"] for each in stopped)


def test_precision_and_offload_are_the_models(model: str) -> None:
    given = (model, "--prompt", PROMPT, "--max-new-tokens", 4, "--json")
    plain = json.loads(steppe(*given).stdout)
    offloaded = json.loads(steppe(*given, "--offload", "disk").stdout)
    assert (offloaded["tokens"], offloaded["offload"]) == (plain["tokens"], "disk")
    assert json.loads(steppe(*given, "--precision", "bf16").stdout)["precision"] == "bf16"


@pytest.mark.slow
def test_text_is_there_while_it_is_written(model: str) -> None:
    """The first pieces reach a pipe before the process has ended."""
    words = [sys.executable, "-m", "launch.cli", "generate", model, "--prompt", "x", "--max-new-tokens", "3000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert len(process.stdout.read(8)) == 8
        still_writing = process.poll() is None
        process.kill()
    assert still_writing


def test_mistakes_are_found_before_the_model_is_read(tmp_path: Path) -> None:
    missing = tmp_path / "no_model"
    cases = {
        "by one of --prompt": (),
        "max_new_tokens=0": ("--prompt", "x", "--max-new-tokens", 0),
        "top_k=3 has no effect": ("--prompt", "x", "--top-k", 3),
        "--step latest": ("--prompt", "x", "--step", "latest"),
        "--batch-size 0": ("--prompt", "x", "--batch-size", 0),
        "cannot be written": ("--prompt", "x", "--out", tmp_path / "no" / "out.jsonl"),
        "is not a model": ("--prompt", "x"),
    }
    for message, options in cases.items():
        found = steppe(missing, *options)
        assert isinstance(found.exception, ValueError), message
        assert message in str(found.exception)
        assert found.stdout == ""
