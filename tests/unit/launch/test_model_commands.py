"""`steppe eval` and `steppe generate`, as a person types them."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from launch.commands.evaluate import evaluate
from launch.commands.generate import generate
from tests.tiny_hf import TEXTS, tiny_hf_folder

app = typer.Typer()
app.command("eval")(evaluate)
app.command("generate")(generate)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_hf_folder(tmp_path_factory.mktemp("hf")))


@pytest.fixture
def corpora(tmp_path: Path) -> list[str]:
    for name, text in zip("abc", TEXTS, strict=False):
        (tmp_path / f"{name}.txt").write_text(text)
    return [str(tmp_path / f"{name}.txt") for name in "abc"]


def steppe(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_eval_prints_one_object(model: str, corpora: list[str]) -> None:
    found = steppe("eval", model, "--data", *corpora, "--window", "32", "--stride", "16", "--json")
    result = json.loads(found.stdout)
    assert list(result["by_domain"]) == ["a", "b", "c"]
    assert (result["window"], result["stride"], result["documents"]) == (32, 16, 3)
    repeated = steppe("eval", model, "--data", f"a={corpora[0]}", "--data", f"x={corpora[1]}", "--json")
    assert list(json.loads(repeated.stdout)["by_domain"]) == ["a", "x"]


def test_eval_prints_a_table(model: str, corpora: list[str]) -> None:
    table = steppe("eval", model, "--data", *corpora).stdout
    result = json.loads(steppe("eval", model, "--data", *corpora, "--json").stdout)
    for shown in (
        f"{result['perplexity']:.3f}",
        f"{result['bits_per_byte']:.4f}",
        f"{result['tokens']:,}",
        "all",
        "BOS",
    ):
        assert shown in table


def test_generate_prints_prompt_and_text(model: str, tmp_path: Path) -> None:
    prompt = "def f(x):\r\n    return"
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    options = ("--max-new-tokens", "8", "--temperature", "0.8", "--seed", "3")
    result = json.loads(steppe("generate", model, "--prompt", prompt, *options, "--json").stdout)
    assert result["prompt"] == prompt
    assert len(result["tokens"]) <= 8
    plain = steppe("generate", model, "--prompt", prompt, *options).stdout_bytes.decode()
    assert plain == prompt + result["text"] + "\n"
    from_file = steppe("generate", model, "--prompt-file", str(tmp_path / "prompt.txt"), *options, "--json")
    assert json.loads(from_file.stdout) == result


def test_a_prompt_comes_from_one_place(model: str, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    cases = {
        "either by --prompt TEXT or by --prompt-file": (),
        "either by --prompt TEXT": ("--prompt", "x", "--prompt-file", str(tmp_path / "latin.txt")),
        "does not exist": ("--prompt-file", str(tmp_path / "missing.txt")),
        "is not UTF-8": ("--prompt-file", str(tmp_path / "latin.txt")),
    }
    for message, options in cases.items():
        error = steppe("generate", model, *options).exception
        assert isinstance(error, ValueError)
        assert message in str(error)


def test_eval_leaves_mistakes_to_the_command_line(model: str, corpora: list[str]) -> None:
    cases = {
        "is not a model": (str(Path(corpora[0]).parent), "--data", corpora[0]),
        "stride=65": (model, "--data", corpora[0], "--stride", "65"),
        "does not exist": (model, "--data", "missing.txt"),
        "the domain a is": (model, "--data", corpora[0], corpora[0]),
    }
    for message, arguments in cases.items():
        found = steppe("eval", *arguments, "--json")
        assert isinstance(found.exception, ValueError), arguments
        assert message in str(found.exception)
        assert found.stdout == ""
