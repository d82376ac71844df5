"""`steppe data` as it is typed: real files in, real files out."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launch.commands.data import app

RUNNER = CliRunner()
TEXTS = [f"Document {i}.\n\n    indented line {i * i}\n" * 5 for i in range(50)]


def run(*arguments: object) -> Result:
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    halves = TEXTS[:25], TEXTS[25:]
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl.gz"]
    contents = ["".join(json.dumps({"body": text}) + "\n" for text in half).encode() for half in halves]
    paths[0].write_bytes(contents[0] + b"broken\n")
    paths[1].write_bytes(gzip.compress(contents[1]))
    return paths


@pytest.fixture
def folder(corpus: list[Path], tmp_path: Path) -> Path:
    model, out = tmp_path / "t.model", tmp_path / "d"
    field = ("--text-field", "body")
    trained = run_json("train-tokenizer", "--input", *corpus, "--vocab-size", 310, "--out", model, *field)
    assert trained["documents"] == 50
    assert trained["text_bytes"] == sum(map(len, TEXTS))
    assert trained["rejected"] == 1
    prepared = run_json("prepare", "--input", *corpus, "--tokenizer", model, "--out", out, "--workers", 2, *field)
    assert prepared["documents"] == 50
    assert prepared["quarantined"] == 1
    assert prepared["tokenizer_fingerprint"] == trained["fingerprint"]
    return out


def test_from_text_to_a_verified_folder(folder: Path) -> None:
    verified = run_json("verify", folder)
    shown = run_json("show", folder)
    assert verified["tokens"] == shown["tokens"]
    assert verified["manifest_fingerprint"] == shown["fingerprint"]
    assert shown["first_document"] == TEXTS[0]
    assert shown["bytes_per_token"] == pytest.approx(shown["text_bytes"] / shown["tokens"], abs=1e-4)


def test_inputs_may_be_repeated_or_follow_each_other(corpus: list[Path], folder: Path, tmp_path: Path) -> None:
    a, b = corpus
    common = ("--tokenizer", tmp_path / "t.model", "--text-field", "body")
    repeated = run_json("prepare", "--input", a, "--input", b, *common, "--out", tmp_path / "repeated")
    following = run_json("prepare", *common, "--out", tmp_path / "following", "--input", a, b)
    assert repeated["fingerprint"] == following["fingerprint"] == run_json("show", folder)["fingerprint"]


def test_people_get_tables(folder: Path) -> None:
    shown = run("show", folder)
    assert "shard_00000" in shown.stdout
    assert "bytes per token" in shown.stdout
    assert "    indented line 0" in shown.stdout
    assert re.search(r"documents +50\n", run("verify", folder).stdout)


def test_damage_is_named(folder: Path) -> None:
    shard = folder / "shard_00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 4
    shard.write_bytes(content)
    result = run("verify", folder)
    assert isinstance(result.exception, ValueError)
    assert "shard_00000.bin, block 0" in str(result.exception)
    assert isinstance(run("show", folder).exception, ValueError)


def test_errors_are_raised_for_the_top_level(corpus: list[Path], folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "t.model"
    for arguments, message in [
        (("prepare", "--input", corpus[0], "--tokenizer", model, "--out", folder), "exists and is finished"),
        (("prepare", "--input", "nowhere", "--tokenizer", model, "--out", tmp_path / "e"), "nowhere does not exist"),
        (("prepare", "--input", corpus[0], "--tokenizer", model, "--out", tmp_path / "e"), "no document in"),
        (("prepare", "--tokenizer", model, "--out", tmp_path / "e"), "either --input PATH ... or --corpus FILE"),
        (("train-tokenizer", "--input", corpus[0], "--vocab-size", 310, "--out", model), "exists: choose another"),
        (("verify", tmp_path / "nowhere"), "nowhere does not exist"),
        (("show", tmp_path), "is unfinished or no data folder"),
    ]:
        result = run(*arguments)
        assert isinstance(result.exception, ValueError), arguments
        assert message in str(result.exception)
    assert run("prepare", "--input", corpus[0], "--out", tmp_path / "e").exit_code == 2


def test_the_commands_load_nothing_heavy_before_they_run() -> None:
    code = "import sys, launch.commands.data; assert not {'torch', 'numpy', 'sentencepiece', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
