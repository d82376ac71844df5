"""`steppe bench eval`: contenders that score the same targets, in turn, and what is said of them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from launch.bench.app import app
from launch.bench.evaluation import CONTENDERS, WORKS, check_same_work, some_of
from pretrain.hf_tokenizer import write_fast_tokenizer
from tests.tiny_hf import TEXTS, tiny_hf_folder

RECIPE = """
name: small
model: {hidden_size: 32, num_layers: 2, num_heads: 2, ffn_size: 64, vocab_size: 500}
data: {sequence_length: 8, sources: [{name: text, path: nowhere}]}
batch: {global_batch_size: 4, micro_batch_size: 4}
optimizer: {lr: 1.0e-3}
schedule: {name: constant, total_steps: 100}
"""


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


@pytest.mark.slow
def test_all_contenders_do_the_same_work(text: str, tmp_path: Path) -> None:
    """fp32 with weights far from uniform: a target too many or one window cut elsewhere would show in the loss."""
    pytest.importorskip("lm_eval")
    folder = tiny_hf_folder(tmp_path / "hf")
    write_fast_tokenizer(folder / "tokenizer.model", folder, 64)
    options = ("--model", str(folder), "--input", text, "--text-kb", "3", "--window", "32", "--rounds", "3")
    found = CliRunner().invoke(app, ["eval", *options, "--precision", "fp32", "--json"])
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert list(result["works"]) == list(WORKS)
    assert result["left_out"] == {}
    for name, work in result["works"].items():
        able = [peer for peer in CONTENDERS if name != "strided" or not peer.startswith("lm-eval")]
        assert list(work["contenders"]) == able
        ours, plain = work["contenders"]["steppe"], work["contenders"]["transformers"]
        assert plain["loss"] == pytest.approx(ours["loss"], rel=1e-5)
        for its in work["contenders"].values():
            speed = its["tokens_per_second"]
            assert 0 < speed["min"] <= speed["median"] <= speed["max"]
            assert len(its["tokens_per_second_by_round"]) == 3
            assert its["peak_memory_bytes"] > 1e8
        assert list(work["ratios"]) == [f"steppe/{peer}" for peer in able[1:]]
    works = result["works"]
    assert works["strided"]["tokens"] == works["documents"]["tokens"]
    assert works["strided"]["contenders"]["steppe"]["loss"] != works["documents"]["contenders"]["steppe"]["loss"]
    assert works["paragraphs"]["documents"] > works["documents"]["documents"]


@pytest.mark.slow
def test_a_recipe_gets_a_tokenizer_of_its_own(text: str, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    options = ("--recipe", str(tmp_path / "small.yaml"), "--input", text, "--text-kb", "2", "--window", "32")
    found = CliRunner().invoke(app, ["eval", *options, "--rounds", "1", "--peer", "transformers"])
    assert found.exit_code == 0, found.output
    for work in WORKS:
        assert f"{work}: " in found.stdout
    assert "Steppe / the plain loop" in found.stdout


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--peer", "megatron", "--peer megatron is not known: choose from transformers"),
        ("--model", "nowhere", "--model nowhere is no Hugging Face folder (config.json): name one"),
    ],
)
def test_a_mistake_is_refused_before_anyone_starts(option: str, value: str, message: str) -> None:
    error = CliRunner().invoke(app, ["eval", option, value]).exception
    assert isinstance(error, ValueError)
    assert message in str(error)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=30), st.integers(1, 200))
def test_some_of_a_text_is_about_so_much(texts: list[str], text_bytes: int) -> None:
    chosen = some_of(texts, text_bytes)
    total, found = (sum(len(text.encode()) for text in part) for part in (texts, chosen))
    assert min(total, text_bytes) - 3 <= found <= text_bytes  # 3: a character that would be cut is left out
    assert all(any(text.startswith(piece) for text in texts) for piece in chosen)


def test_other_work_is_no_comparison() -> None:
    check_same_work({"steppe": 3.0, "transformers": 3.004, "lm-eval": 3.04})
    with pytest.raises(RuntimeError, match="transformers has a loss of 3.0400 where ours is 3.0000"):
        check_same_work({"steppe": 3.0, "transformers": 3.04})
