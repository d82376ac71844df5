"""A tokenizer.json all the way: from text to a run, its checkpoint, its perplexity and its text."""

import json
from pathlib import Path

import pytest

from data_pipeline.tokenizer import Tokenizer
from pretrain.checkpoint.index import read_index
from pretrain.run_dir import RunDir
from tests.conftest import STDLIB, Corpus, Steppe
from tests.json_tokenizers import SPLITS, trained, write

pytestmark = pytest.mark.slow


def test_from_text_to_text(steppe: Steppe, tmp_path: Path) -> None:
    texts = [path.read_text() for path in sorted((STDLIB / "json").glob("*.py"))]
    tokenizer = Tokenizer(write(tmp_path / "published", trained(texts, SPLITS["llama 3"], vocab_size=600)))
    data = tmp_path / "data"
    steppe("data", "prepare", "--input", STDLIB / "json", "--tokenizer", tokenizer.path, "--out", data)
    steppe("data", "verify", data)
    corpus = Corpus(tokenizer.path, data, data, STDLIB / "json")
    run = RunDir(tmp_path / "run")
    settings = corpus.settings("schedule={warmup_steps: 1, total_steps: 2}", "checkpoint={every_steps: 2, keep: 1}")
    steppe("train", "demo", "--nproc", 1, "--run-dir", run.path, *settings)
    checkpoint = run.checkpoints / "step_00000002"
    for folder in (data, run.path, checkpoint):
        assert Tokenizer(folder / "tokenizer.json").fingerprint == tokenizer.fingerprint
    assert read_index(checkpoint).tokenizer_fingerprint == tokenizer.fingerprint
    said = json.loads(steppe("eval", run.path, "--data", STDLIB / "json" / "tool.py", "--json").stdout)
    assert said["start_token"] == "bos"
    assert steppe("generate", checkpoint, "--prompt", "def ", "--max-new-tokens", 3).stdout.startswith("def ")

    # Damage to what names EOS is told before any rank starts.
    config = data / "tokenizer_config.json"
    config.write_text(config.read_text().replace("end", "eat"))
    told = steppe("train", "demo", "--nproc", 1, "--run-dir", tmp_path / "other", *settings, code=2)
    assert "tokenizer.json is not the tokenizer that" in told.stderr
