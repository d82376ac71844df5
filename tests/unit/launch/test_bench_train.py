"""`steppe bench train`: contenders that do the same work, in turn, and what is said of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from launch.bench.app import app
from launch.bench.contenders import CONTENDERS, keeps_memory
from launch.bench.dense_counterpart import dense_counterpart
from launch.bench.train import bench_config, check_same_work, run
from launch.bench.train_ranks import print_ranks, run_ranks
from launch.bench.train_table import console, print_table, table_of
from launch.bench.transformers_peer import EXPERTS, build_model
from launch.bench.turns import Contender, Place, Spread, Team, ratios, take_turns
from model.accounting import parameter_counts
from model.config import ModelConfig
from pretrain.affinity import BIND
from pretrain.engine import build_decoder, decoder_inputs
from pretrain.random_batch import random_batch
from pretrain.recipe import load_config

RECIPE = """
name: small
model: {hidden_size: 32, num_layers: 2, num_heads: 2, ffn_size: 64, vocab_size: 500}
data: {sequence_length: 8, sources: [{name: text, path: nowhere}]}
batch: {global_batch_size: 4, micro_batch_size: 4}
optimizer: {lr: 1.0e-3}
schedule: {name: constant, total_steps: 100}
"""
EXPERTS_OF_SMALL = "moe: {experts: 4, experts_per_token: 2, expert_ffn_size: 24}"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "small.yaml").write_text(RECIPE)
    return str(tmp_path / "small.yaml")


@pytest.fixture
def moe_recipe(tmp_path: Path) -> str:
    (tmp_path / "small-moe.yaml").write_text(RECIPE.replace("ffn_size: 64", f"ffn_size: 64, {EXPERTS_OF_SMALL}"))
    return str(tmp_path / "small-moe.yaml")


@pytest.mark.slow
def test_all_contenders_do_the_same_work(recipe: str) -> None:
    words = ["train", "--recipe", recipe, "--rounds", "3", "--steps", "2", "--sequence-length", "64", "--json"]
    found = CliRunner().invoke(app, [*words, "--peers", "steppe-compiled,bare,transformers-mixed"])
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["sequence_length"] == 64
    peers = ["bare", "transformers-mixed"]
    assert list(result["contenders"]) == ["steppe", "steppe-compiled", *peers]
    assert list(result["ratios"]) == [
        "steppe/steppe-compiled",
        *(f"{own}/{peer}" for own in ("steppe", "steppe-compiled") for peer in peers),
    ]
    ours = result["contenders"]["steppe"]
    for peer in result["contenders"].values():
        speed = peer["tokens_per_second"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert len(peer["tokens_per_second_by_round"]) == 3
        assert peer["peak_memory_bytes"] > 10**8
        eager = result["contenders"]["transformers-mixed"]["peak_memory_bytes"]
        assert peer["peak_memory_of_eager"] == peer["peak_memory_bytes"] / eager
        # The same weights on the same tokens: in bf16 the losses are near each other, and they move.
        for loss in ("loss_at_first_step", "loss_at_end"):
            assert peer[loss] == pytest.approx(ours[loss], rel=2e-3)
        assert peer["loss_at_end"] != peer["loss_at_first_step"]
        assert peer["active_parameters"] == peer["total_parameters"] == ours["total_parameters"]
    # Not rounded in other places, but the same arithmetic.
    assert result["contenders"]["bare"]["loss_at_end"] == pytest.approx(ours["loss_at_end"], rel=1e-5)
    limit = result["limit"]
    assert list(limit["reached"]) == ["steppe", "steppe-compiled"]
    assert limit["tokens_per_second"] == 64 * 8 / sum(limit["seconds_a_step"].values())
    assert list(limit["seconds_a_step"]) == ["matrix products", "attention", "adamw"]
    assert limit["reached"]["steppe"]["median"] == ours["tokens_per_second"]["median"] / limit["tokens_per_second"]
    assert result["overhead"].keys() == {"of_bare", "aim", "operators"}
    print_table(result)


@pytest.mark.slow
def test_a_benchmark_that_is_told_to_end_leaves_nothing_behind(recipe: str, tmp_path: Path) -> None:
    """SIGTERM, as `timeout` sends it, is Ctrl-C."""
    words = [sys.executable, "-m", "launch.cli", "bench", "train", "--recipe", recipe, "--peers", "bare"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([*words, "--rounds", "1000"], stderr=subprocess.PIPE, text=True, env=environment) as bench:
        assert bench.stderr is not None
        while "warming up" not in (line := bench.stderr.readline()):
            assert line, "it ended by itself"
        contenders = [child for child in children(bench.pid) if b"train_contender" in command_line(child)]
        assert len(contenders) == 2
        bench.terminate()
        bench.stderr.read()
    assert bench.returncode == 130
    assert not any(b"train_contender" in command_line(child) for child in contenders)
    assert not list(tmp_path.glob("steppe-bench-*"))


def children(pid: int) -> list[int]:
    """Of a process, and theirs."""
    own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return own + [grandchild for child in own for grandchild in children(child)]


def command_line(pid: int) -> bytes:
    """Nothing if it has ended."""
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_bytes() if path.exists() else b""


@pytest.mark.slow
def test_experts_run_beside_a_dense_model_and_transformers(moe_recipe: str) -> None:
    config = bench_config(moe_recipe, sequence_length=64, micro_batch_size=4)
    result = run(moe_recipe, config, rounds=1, steps=2, peers="steppe-dense,transformers-mixed")
    contenders = result["contenders"]
    assert list(contenders) == ["steppe", "steppe-dense", "transformers-mixed"]
    ours, dense, theirs = (contenders[name] for name in ("steppe", "steppe-dense", "transformers-mixed"))
    routers = 2 * 4 * 32
    assert dense["total_parameters"] == dense["active_parameters"] == ours["active_parameters"] - routers
    assert dense["ffn_size"] == 48
    assert result["overhead"] is None
    assert theirs["class"] == "MixtralForCausalLM"
    assert theirs["experts"] in EXPERTS
    assert theirs["total_parameters"] == ours["total_parameters"]
    assert theirs["loss_at_first_step"] == pytest.approx(ours["loss_at_first_step"], rel=2e-3)


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each rank needs a core")
def test_ranks_are_compared_with_one_alone_and_with_ranks_apart(recipe: str) -> None:
    words = ["train", "--recipe", recipe, "--rounds", "2", "--steps", "2", "--ranks", "2", "--zero-stage", "2"]
    found = CliRunner().invoke(app, [*words, "--micro-batch-size", "4", "--sequence-length", "64", "--json"])
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    settings, gains = result["settings"], result["gains"]
    assert list(settings) == list(gains) == ["ranks", "apart", "one-share", "one-all"]
    assert result["zero_stage"] == 2
    assert settings["ranks"]["what"].startswith("2 ranks, ZeRO 2, ")
    assert [len(setting["peak_memory_bytes"]) for setting in settings.values()] == [2, 2, 1, 1]
    assert gains["one-share"] == {"median": 1, "min": 1, "max": 1}
    # The same batches, whatever the threads; two ranks have another rank's targets besides.
    alone = settings["one-all"]["loss_at_first_step"]
    assert settings["apart"]["loss_at_first_step"] == pytest.approx(alone, rel=1e-4)
    assert settings["one-share"]["loss_at_first_step"] == settings["apart"]["loss_at_first_step"]
    assert settings["ranks"]["loss_at_first_step"] != alone
    assert settings["ranks"]["loss_at_first_step"] == pytest.approx(alone, rel=0.01)
    print_ranks(result)


@pytest.mark.parametrize("experts", [False, True])
def test_transformers_starts_from_our_weights(recipe: str, moe_recipe: str, experts: bool) -> None:
    """In fp32, where a wrong weight shows."""
    config = load_config(Path(moe_recipe if experts else recipe))
    device = torch.device("cpu")
    tokens = decoder_inputs(random_batch(config, 0), device)["tokens_BT"]
    assert tokens is not None
    theirs = build_model(config, device, torch.float32)(input_ids=tokens).logits
    decoder = build_decoder(config, device, torch.float32)
    torch.testing.assert_close(theirs, decoder.logits(decoder.hidden(tokens)), rtol=1e-5, atol=1e-6)


@settings(max_examples=50)
@given(
    layers=st.integers(1, 6),
    first_layer=st.integers(0, 5),
    layer_frequency=st.integers(1, 3),
    experts_per_token=st.integers(2, 4),
    shared_experts=st.integers(0, 2),
    width=st.integers(1, 8),
    tied=st.booleans(),
)
def test_a_dense_model_of_equal_active_parameters(
    layers: int,
    first_layer: int,
    layer_frequency: int,
    experts_per_token: int,
    shared_experts: int,
    width: int,
    tied: bool,
) -> None:
    moe = {
        "experts": 8,
        "experts_per_token": experts_per_token,
        "expert_ffn_size": 8 * width,
        "shared_experts": shared_experts,
        "first_layer": min(first_layer, layers - 1),
        "layer_frequency": layer_frequency,
    }
    shape = {"hidden_size": 32, "num_layers": layers, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 40}
    model = ModelConfig.model_validate(
        {**shape, "vocab_size": 100, "tie_embeddings": tied, "qk_norm": True, "moe": moe}
    )
    dense = dense_counterpart(model)
    sparse_counts, dense_counts = parameter_counts(model), parameter_counts(dense)
    assert ModelConfig.model_validate(dense.model_dump()) == dense
    assert {key: dense_counts[key] for key in ("embedding", "attention", "norms", "head")} == {
        key: sparse_counts[key] for key in ("embedding", "attention", "norms", "head")
    }
    difference = dense_counts["active"] - (sparse_counts["active"] - sparse_counts["router"])
    everywhere = moe["first_layer"] == 0 and layer_frequency == 1
    # One width for all layers, a multiple of 8: by at most 4 wrong in each, nowhere if all layers are alike.
    assert abs(difference) <= (0 if everywhere else layers * 3 * 32 * 4)


def test_what_all_have_in_common_is_not_overridden(recipe: str) -> None:
    config = bench_config(recipe, 16, 4, ["model.num_layers=3", "parallel.compile=true"], zero_stage=2, ranks=2)
    assert (config.model.num_layers, config.parallel.compile, config.parallel.zero_stage) == (3, True, 2)
    assert (config.data.sequence_length, config.batch.global_batch_size, config.batch.micro_batch_size) == (16, 8, 4)
    for override in (
        "precision=fp32",
        "deterministic=True",
        "data.sequence_length=32",
        "batch.micro_batch_size=2",
        "parallel.zero_stage=3",
        "parallel.compile=True",
    ):
        with pytest.raises(ValueError, match=f"--set {override}: what is measured has .*; leave it out"):
            bench_config(recipe, 16, 4, [override])


def test_another_optimizer_is_not_compared(recipe: str) -> None:
    with pytest.raises(ValueError, match="optimizer.name=muon: the peers and the limit are of adamw: set that"):
        run(recipe, bench_config(recipe, 8, 1, ["optimizer.name=muon"]), rounds=1, steps=1)


def test_ranks_have_no_peers_and_a_core_each(recipe: str) -> None:
    found = CliRunner().invoke(app, ["train", "--recipe", recipe, "--ranks", "2", "--peers", "bare"])
    assert isinstance(found.exception, ValueError)
    assert "--ranks 2 compares Steppe with itself: leave out --peers" in str(found.exception)
    assert "--nanogpt" not in str(found.exception)
    with pytest.raises(ValueError, match=r"--ranks 5000: each rank needs a core, and this process may use \d+"):
        run_ranks(recipe, bench_config(recipe, 8, 1, ranks=5000), 5000, 1, 1)


def test_a_table_loses_no_digit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal of any width."""
    monkeypatch.setenv("COLUMNS", "80")
    table = table_of("speeds", "contender", ("tokens/s", "min to max") * 3)
    table.add_row("transformers-mixed-compiled", *("1,234,567", "1,234,000 to 1,235,000") * 3)
    console().print(table)
    assert capsys.readouterr().out.count("1,234,000 to 1,235,000") == 3


def test_other_work_is_not_reported() -> None:
    check_same_work({"steppe": 9.0, "transformers": 9.01})
    for loss in (9.1, float("nan")):
        with pytest.raises(RuntimeError, match="transformers has a loss of .* it is not the same work"):
            check_same_work({"steppe": 9.0, "transformers": loss})


def test_a_contender_that_ends_says_why(tmp_path: Path) -> None:
    with (
        Contender("steppe", "launch.bench.no_such_module", [], threads=1) as contender,
        pytest.raises(RuntimeError, match=r"steppe ended with code 1: .*no_such_module"),
    ):
        contender.built()


def test_a_contender_starts_with_what_it_is_given(tmp_path: Path) -> None:
    """Over its place and what this process has."""
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    (tmp_path / "told.py").write_text(code)
    besides = {"PYTHONPATH": str(tmp_path), "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
    with Contender("told", "told", [], threads=3, environment=besides) as contender:
        told = contender.built()
    assert {name: told[name] for name in besides} == besides
    assert (told["OMP_NUM_THREADS"], told["RANK"]) == ("3", "0")


def test_whose_memory_is_kept() -> None:
    """Ours, and with `--keep-memory` everybody's."""
    assert [name for name in CONTENDERS if keeps_memory(name, peers_too=False)] == [
        "steppe",
        "steppe-compiled",
        "bare",
        "steppe-dense",
    ]
    assert all(keeps_memory(name, peers_too=True) for name in CONTENDERS)


def test_a_contender_that_is_gone_says_why(tmp_path: Path) -> None:
    """Also if it ended between two questions, as one does that is killed for its memory."""
    (tmp_path / "first.json").write_text("{}")
    with Contender("steppe", "json.tool", ["--compact", str(tmp_path / "first.json")], threads=1) as contender:
        assert contender.built() == {}
        contender._process.wait()
        with pytest.raises(RuntimeError, match="steppe ended with code 0"):
            contender.ask(steps=1)


class Recorded:
    """A contender that notes when it was asked."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def ask(self, **question: int) -> dict[str, int]:
        self.order.append(self.name)
        return {"seconds": len(self.order), **question}


def test_a_team_is_asked_before_any_of_it_is_heard() -> None:
    """Else its members, who may wait for each other, would wait for ever."""

    class Member:
        def put(self, **question: int) -> None:
            said.append("put")

        def built(self) -> int:
            said.append("built")
            return len(said)

    said: list[str] = []
    assert Team("both", [Member(), Member()]).ask(steps=1) == {"members": [3, 4]}  # type: ignore[list-item]
    assert said == ["put", "put", "built", "built"]


def test_a_place_is_what_a_launcher_tells_a_rank() -> None:
    told = Place(rank=1, world=2, local_rank=1, local_world=2, bound=True, port=29500).environment()
    assert told == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        BIND: "1",
    }
    first, second = (Place().environment() for _ in range(2))
    assert BIND not in first
    assert first["MASTER_PORT"] != second["MASTER_PORT"]


def test_the_order_turns_round_each_round() -> None:
    order: list[str] = []
    contenders = [Recorded("a", order), Recorded("b", order)]
    answers = take_turns(contenders, 3, {"steps": 4}, lambda name, number: None)  # type: ignore[arg-type]
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [answer["seconds"] for answer in answers["b"]] == [2, 3, 6]
    assert all(answer["steps"] == 4 for turns in answers.values() for answer in turns)


def test_ratios_are_taken_pair_by_pair() -> None:
    assert ratios([10, 30, 80], [10, 20, 20]) == Spread(median=1.5, min=1.0, max=4.0)
