"""`steppe bench train`: contenders that do the same work, in turn, and what is said of them."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.bench.app import app
from launch.bench.train import run
from launch.bench.turns import Contender, Spread, ratios, take_turns

RECIPE = """
name: small
model: {hidden_size: 32, num_layers: 2, num_heads: 2, ffn_size: 64, vocab_size: 500}
data: {sequence_length: 8, sources: [{name: text, path: nowhere}]}
batch: {global_batch_size: 4, micro_batch_size: 4}
optimizer: {lr: 1.0e-3}
schedule: {name: constant, total_steps: 100}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "small.yaml").write_text(RECIPE)
    return str(tmp_path / "small.yaml")


@pytest.mark.slow
def test_all_contenders_do_the_same_work(recipe: str) -> None:
    found = CliRunner().invoke(
        app, ["train", "--recipe", recipe, "--rounds", "3", "--steps", "2", "--sequence-length", "64", "--json"]
    )
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["sequence_length"] == 64
    assert list(result["contenders"]) == ["steppe", "transformers", "transformers-bf16"]
    assert list(result["ratios"]) == ["steppe/transformers", "steppe/transformers-bf16"]
    ours = result["contenders"]["steppe"]
    for peer in result["contenders"].values():
        speed = peer["tokens_per_second"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert len(peer["tokens_per_second_by_round"]) == 3
        assert peer["peak_memory_bytes"] > 10**8
        # The same weights on the same tokens: in bf16 the losses are near each other, and they move.
        assert peer["loss_after_warm_up"] == pytest.approx(ours["loss_after_warm_up"], rel=2e-3)
        assert peer["loss_at_end"] != peer["loss_after_warm_up"]


def test_an_unknown_peer_is_refused(recipe: str) -> None:
    with pytest.raises(ValueError, match="--peer nanogpt is not known: choose from transformers"):
        run(recipe, 1, 1, 8, 1, ["nanogpt"])


def test_a_missing_peer_is_named_with_its_remedy(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        run(recipe, 1, 1, 8, 1, ["transformers"])


def test_a_contender_that_ends_says_why(tmp_path: Path) -> None:
    with (
        Contender("steppe", "launch.bench.no_such_module", [], threads=1) as contender,
        pytest.raises(RuntimeError, match=r"steppe ended with code 1: .*no_such_module"),
    ):
        contender.built()


class Recorded:
    """A contender that notes when it was asked."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def ask(self, **question: int) -> dict[str, int]:
        self.order.append(self.name)
        return {"seconds": len(self.order), **question}


def test_the_order_turns_round_each_round() -> None:
    order: list[str] = []
    contenders = [Recorded("a", order), Recorded("b", order)]
    answers = take_turns(contenders, 3, {"steps": 4}, lambda name, number: None)  # type: ignore[arg-type]
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [answer["seconds"] for answer in answers["b"]] == [2, 3, 6]
    assert all(answer["steps"] == 4 for turns in answers.values() for answer in turns)


def test_ratios_are_taken_pair_by_pair() -> None:
    assert ratios([10, 30, 80], [10, 20, 20]) == Spread(median=1.5, min=1.0, max=4.0)
