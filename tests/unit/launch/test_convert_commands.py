"""`steppe export` and `steppe import`, as a person types them."""

import json
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from data_pipeline.tokenizer import Tokenizer
from launch.commands.convert import export, import_
from pretrain.load_model import load_model
from tests.conftest import Corpus, Steppe
from tests.exported import write_checkpoint

app = typer.Typer()
app.command("export")(export)
app.command("import")(import_)


def steppe_here(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
@torch.no_grad()
def test_a_run_there_and_back(steppe: Steppe, corpus: Corpus, tmp_path: Path) -> None:
    """A trained run, by the real command line: the same logits for the same text, to transformers and to us."""
    run, there, back = tmp_path / "run", tmp_path / "there", tmp_path / "back"
    steppe("train", "58m", "--run-dir", run, *corpus.settings("evaluation.every_steps=0"))
    exported = json.loads(steppe("export", run, "--out", there, "--max-shard-size", "20KB", "--json").stdout)
    assert (exported["step"], exported["architecture"], exported["dtype"]) == (12, "LlamaForCausalLM", "fp32")
    assert exported["shards"] == len(list(there.glob("*.safetensors"))) > 2
    imported = json.loads(steppe("import", there, "--out", back, "--json").stdout)
    assert imported["parameters"] == exported["parameters"]

    text = (corpus.text / "decoder.py").read_text()
    tokenizer = AutoTokenizer.from_pretrained(there, add_bos_token=True)
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == [1, *Tokenizer(corpus.tokenizer).encode(text)]
    logits = []
    for model in (run, there, back):
        loaded = load_model(model)
        assert loaded.tokenizer.fingerprint == Tokenizer(corpus.tokenizer).fingerprint
        logits.append(loaded.model.decoder.logits(loaded.model.decoder.hidden(ids[:, :64])))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    theirs = AutoModelForCausalLM.from_pretrained(there)
    torch.testing.assert_close(theirs(ids[:, :64]).logits, logits[0], rtol=1e-5, atol=1e-5)

    earlier = steppe_here("export", run, "--step", 8, "--out", tmp_path / "8", "--dtype", "bf16", "--json")
    assert json.loads(earlier.stdout)["step"] == 8
    assert json.loads(earlier.stdout)["bytes"] == exported["bytes"] // 2


def test_what_a_person_reads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", with_tokenizer=True)
    exported = steppe_here("export", tmp_path / "checkpoint", "--out", tmp_path / "there", "--check-memory", "0")
    for words in (
        "LlamaForCausalLM, 143,808 parameters of step 0 in fp32, 0.6 MB in 1 file\n",
        "logits equal transformers' on 256 tokens (layer by layer; largest difference ",
        "AutoTokenizer.from_pretrained(DIR, add_bos_token=True) adds it",
    ):
        assert words in exported.stdout
    imported = steppe_here("import", tmp_path / "there", "--out", tmp_path / "back")
    assert "143,808 parameters, context 48 tokens" in imported.stdout
    assert "steppe train RECIPE --set 'model={hidden_size: 64, " in imported.stdout
    assert f"--set init_from={tmp_path / 'back'}\n" in imported.stdout
    plain = steppe_here("export", tmp_path / "back", "--out", tmp_path / "plain", "--no-tokenizer")
    assert "no tokenizer was written" in plain.stdout
    without = steppe_here("import", tmp_path / "plain", "--out", tmp_path / "bare")
    assert "eval and generate need --tokenizer FILE" in without.stdout


@pytest.mark.parametrize(
    ("size", "files"), [("60KB", 10), ("60000", 10), ("0.06 mb", 10), ("5GB", 1), ("1tb", 1), ("60000B", 10)]
)
def test_sizes(size: str, files: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    done = steppe_here("export", tmp_path / "checkpoint", "--out", tmp_path / "out", "--max-shard-size", size, "--json")
    assert json.loads(done.stdout)["shards"] == files


@pytest.mark.parametrize("option", ["--max-shard-size", "--check-memory"])
@pytest.mark.parametrize("size", ["5GiB", "large", "-1", "5XB", "GB", "1e9"])
def test_sizes_that_are_none(option: str, size: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    done = steppe_here("export", tmp_path / "checkpoint", "--out", tmp_path / "out", option, size)
    assert isinstance(done.exception, ValueError)
    assert f"{option} {size}: expected a size such as 5GB or 500MB" in str(done.exception)


@pytest.mark.slow
def test_exit_codes(steppe: Steppe, tmp_path: Path) -> None:
    """2 for what the user got wrong, in one line."""
    done = steppe("export", tmp_path, "--out", tmp_path / "out", code=2)
    assert "is neither a run (config.yaml) nor a checkpoint (index.json)" in done.stderr
    assert done.stderr.count("\n") == 1
    done = steppe("import", tmp_path, "--out", tmp_path / "out", code=2)
    assert "has no config.json" in done.stderr
    assert done.stdout == ""
