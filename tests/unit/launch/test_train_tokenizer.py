"""`steppe data train-tokenizer` as it is typed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from data_pipeline.tokenizer import Tokenizer
from launch.commands.data import app


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["train-tokenizer", *map(str, words)])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for name, count in (("web", 300), ("books", 100)):
        lines = [json.dumps({"text": f"{name} say number {at:03}, and then some\n"}) + "\n" for at in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    path = tmp_path / "corpus.yaml"
    inputs = [f"  - {{path: {tmp_path}/{name}.jsonl, weight: {weight}}}" for name, weight in (("web", 1), ("books", 3))]
    path.write_text("\n".join(["inputs:", *inputs]))
    return path


def test_it_says_what_it_was_trained_on(corpus: Path, tmp_path: Path) -> None:
    words = ("--vocab-size", 320, "--out", tmp_path / "t.model", "--sample-bytes", 4000, "--special", "<|user|>")
    result = run("--corpus", corpus, *words, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert {each["name"]: each["text_bytes"] for each in said["inputs"]} == {"web": 1000, "books": 3000}
    assert {each["name"]: each["seen_documents"] for each in said["inputs"]} == {"web": 300, "books": 100}
    assert said["text_bytes"] == 4000
    assert said["documents"] == sum(each["documents"] for each in said["inputs"]) < 150
    tokenizer = Tokenizer(tmp_path / "t.model")
    assert tokenizer.fingerprint == said["fingerprint"]
    assert tokenizer.decode([3]) == ""
    assert 3 not in tokenizer.encode("<|user|>")


def test_seeds(corpus: Path, tmp_path: Path) -> None:
    """The same seed gives the same file; in words it says as much as in JSON."""
    made = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / name
        result = run("--corpus", corpus, "--vocab-size", 320, "--out", out, "--sample-bytes", 4000, "--seed", seed)
        assert f"4,000 bytes (seed {seed})" in result.stdout
        assert "web: " in result.stdout
        assert " of 300 documents, 1,000 of " in result.stdout
        made[name] = out.read_bytes()
    assert made["a"] == made["b"] != made["c"]


def test_what_cannot_be(corpus: Path, tmp_path: Path) -> None:
    words = ("--vocab-size", 320, "--out", tmp_path / "t.model")
    for more, message in (
        ((), "Give either --input PATH ... or --corpus FILE"),
        (("--corpus", corpus, "--special", "a b"), "without white space"),
        (("--corpus", corpus, "--sample-bytes", 0), "--sample-bytes 0"),
        (("--input", tmp_path / "nowhere"), "nowhere does not exist"),
    ):
        result = run(*words, *more)
        assert isinstance(result.exception, ValueError)
        assert message in str(result.exception)
        assert not (tmp_path / "t.model").exists()
