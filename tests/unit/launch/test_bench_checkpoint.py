"""`steppe bench checkpoint`: every contender saves the same bits, and the numbers say what they claim."""

import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from launch.bench import checkpoint_plan
from launch.bench.app import app
from launch.bench.checkpoint import _in_turns, run, verdicts
from launch.bench.checkpoint_contender import beside_training
from launch.bench.checkpoint_formats import UnderWay
from launch.bench.contenders import LOADERS, SAVERS, savers_of
from launch.bench.turns import Contender
from launch.bench.zero_boxes import pieces_of
from model.parameters import buffer_shapes, parameter_shapes
from pretrain.layout import Layout
from pretrain.recipe import load_config

ROOT = Path(__file__).parents[3]
RECIPE = """
name: small
model: {hidden_size: 64, num_layers: 2, num_heads: 8, ffn_size: 128, vocab_size: 500}
data: {sequence_length: 16, sources: [{name: text, path: nowhere}]}
batch: {global_batch_size: 4, micro_batch_size: 4}
optimizer: {lr: 1.0e-3}
schedule: {name: constant, total_steps: 100}
"""
OURS = ["raw", "raw-beside", "steppe-blocking", "steppe-async"]
EXPERTS = "model.moe={experts: 4, experts_per_token: 2, expert_ffn_size: 24, balance: bias}"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path / "small.yaml"


@pytest.mark.slow
def test_every_contender_saves_and_loads(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "target"
    folder.mkdir()
    arguments = ["checkpoint", "--recipe", str(recipe), "--rounds", "2", "--dir", str(folder), "--json"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert list(result["saving"]) == list(SAVERS)
    assert list(result["loading"]) == list(LOADERS)
    parameters = sum(np.prod(shape) for shape in parameter_shapes(load_config(recipe).model).values())
    assert result["state_bytes"] == 12 * parameters
    for saver in result["saving"].values():
        assert saver["written_bytes"] >= result["state_bytes"]
        assert len(saver["by_round"]) == 2
        assert saver["seconds"]["min"] == min(answer["seconds"] for answer in saver["by_round"]) > 0
    for name in ("raw", "steppe-blocking", "torch-save", "deepspeed"):  # training waits for all of it
        assert result["saving"][name]["stall_seconds"] == result["saving"][name]["seconds"]
    for name in ("raw-beside", "steppe-async", "torch-dcp-async"):
        assert result["saving"][name]["steps"] >= 2
        assert result["saving"][name]["stall_seconds"]["min"] > 0
    assert [name for name, saver in result["saving"].items() if not saver["pickle"]] == OURS
    assert len(result["targets"]) == 4
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_a_changed_bit_is_not_the_same(recipe: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(load_config(recipe).model_dump_json())
    module = "launch.bench.checkpoint_contender"
    with Contender("checkpoint", module, [str(config), str(tmp_path)], threads=1) as contender:
        contender.built()
        assert contender.ask(act="save", name="torch-save", check=True)["same"]
        assert contender.ask(act="load", name="torch-load", check=True)["same"]
        (kept,) = tmp_path.glob("*-torch-save/state.pt")
        with open(kept, "rb+") as file:
            file.seek(kept.stat().st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
        assert not contender.ask(act="load", name="torch-load", check=True)["same"]


class Answering:
    """A process whose contenders answer that they read back what they saved, but for one."""

    def __init__(self, lossy: str) -> None:
        self.lossy = lossy

    def ask(self, name: str, **question: Any) -> dict[str, Any]:
        return {"same": name != self.lossy, "seconds": 1.0}


def test_a_saver_that_loses_something_is_not_reported() -> None:
    names = ["raw", "steppe-blocking"]
    assert len(_in_turns(Answering(""), "save", names, 3)["raw"]) == 3  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="steppe-blocking: what is read back is not what was saved"):
        _in_turns(Answering("steppe-blocking"), "save", names, 3)  # type: ignore[arg-type]


def test_stall_and_slowdown_are_told_apart() -> None:
    steps = iter([2.5, 1.75, 1.0])  # two beside the save, one after it

    def step(staged: Any = lambda: None) -> float:
        staged()
        return next(steps)

    asked = []

    def over() -> bool:
        asked.append(True)
        return len(asked) == 2

    def begin() -> UnderWay:
        time.sleep(0.02)
        return UnderWay(lambda: time.sleep(0.05), over, lambda: time.perf_counter() + 5)

    found = beside_training(step, begin, before=2.0)
    assert found["steps"] == 2
    assert found["undisturbed_step_seconds"] == 1.5
    assert 0.07 <= found["stall_seconds"] < 1  # the call, and the wait inside the first step
    assert found["slowdown_seconds"] + found["stall_seconds"] == pytest.approx(2.5 + 1.75 - 2 * 1.5 + 0.02, abs=0.1)
    assert found["slowdown_seconds"] <= 1.25 - 0.05
    assert found["seconds"] >= 5


def test_the_targets_are_judged_by_their_medians() -> None:
    def spread(median: float) -> dict[str, float]:
        return {"median": median, "min": 0.0, "max": 9.0}

    def saving(stall: float, blocking: float, beside: float) -> dict[str, Any]:
        speeds = {"speed_of_raw": spread(beside), "speed_of_raw_beside": spread(blocking)}
        return {
            "steppe-blocking": {"speed_of_raw": spread(blocking)},
            "steppe-async": {"stall_of_blocking": spread(stall), **speeds},
        }

    assert [verdict["met"] for verdict in verdicts(saving(0.049, 0.8, 0.79))] == [True, True, False, True]
    assert [verdict["met"] for verdict in verdicts(saving(0.05, 0.79, 0.8))] == [False, False, True, False]


def test_peers_are_chosen_by_name() -> None:
    assert savers_of([]) == list(SAVERS)
    assert savers_of(["deepspeed", "deepspeed"]) == [*OURS, "deepspeed"]
    with pytest.raises(ValueError, match="--peer megatron is not known: choose from torch-save, "):
        savers_of(["megatron"])
    with pytest.raises(ValueError, match="--peer raw is not known"):
        savers_of(["raw"])


def test_wrong_input_is_refused_before_anything_starts(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--dir .*nowhere is no folder"):
        run(str(recipe), 1, tmp_path / "nowhere", [], [])
    with pytest.raises(ValueError, match="parallel.tensor=2 .* does not divide 1"):
        run(str(recipe), 1, tmp_path, [], ["parallel.tensor=2"])
    with pytest.raises(ValueError, match="--ranks 15: .* choose an even number"):
        checkpoint_plan.run(str(recipe), 15, [])
    found = CliRunner().invoke(app, ["checkpoint", "--ranks", "4"])
    assert "--ranks 4 goes with --plan RECIPE: add that, or leave it out" in str(found.exception)


# ------------------------------------------------------------------------------------------------------ planning


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("degrees", [{}, {"tensor": 2}, {"tensor": 4, "expert": 4}, {"expert": 2, "sequence": 2}])
def test_the_boxes_of_all_ranks_are_the_model_once(recipe: Path, stage: int, degrees: dict[str, int]) -> None:
    world = 8
    overrides = [f"parallel={json.dumps({'zero_stage': stage, **degrees})}", "batch.global_batch_size=32", EXPERTS]
    config = load_config(recipe, [*overrides, "precision=" + ("bf16" if stage else "fp32")])
    layout = Layout.of(config, world)
    times: dict[str, np.ndarray] = {}
    for name, shape in {**parameter_shapes(config.model), **buffer_shapes(config.model)}.items():
        times[name] = np.zeros(shape, dtype=int)
    held: dict[int, int] = defaultdict(int)
    for rank in range(world):
        for piece in pieces_of(config, layout, rank):
            assert piece.shape == times[piece.name].shape
            held[rank] += piece.box.numel
            if piece.writer:
                within = zip(piece.box.offset, piece.box.size, strict=True)
                times[piece.name][tuple(slice(at, at + size) for at, size in within)] += 1
    assert all((counts == 1).all() for counts in times.values())
    if stage:
        assert max(held.values()) < 1.5 * min(held.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "rank", "parallel"),
    [
        (6, 1, "{zero_stage: 3}"),
        (8, 5, "{zero_stage: 3, tensor: 2}"),
        (6, 1, "{zero_stage: 1}"),
        (8, 5, "{zero_stage: 1, tensor: 2}"),
    ],
)
def test_the_boxes_are_those_of_the_engine(recipe: Path, world: int, rank: int, parallel: str) -> None:
    overrides = [f"parallel={parallel}", f"batch={{global_batch_size: {world}, micro_batch_size: 1}}"]
    command = [sys.executable, "-m", "tests.rank_boxes", str(world), str(rank), str(recipe), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    config = load_config(recipe, overrides)
    expected = pieces_of(config, Layout.of(config, world), rank)
    assert sorted(json.loads(done.stdout.splitlines()[-1])) == sorted(
        [p.name, list(p.box.offset), list(p.box.size), p.writer] for p in expected
    )


@pytest.mark.slow
def test_planning_is_measured(recipe: Path) -> None:
    found = CliRunner().invoke(app, ["checkpoint", "--plan", str(recipe), "--ranks", "32", "--json"])
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    parameters = sum(np.prod(shape) for shape in parameter_shapes(load_config(recipe).model).values())
    assert [plan["saved"] for plan in result["plans"]] == list(checkpoint_plan.LAYOUTS)
    assert [plan["loaded"] for plan in result["plans"]] == list(reversed(checkpoint_plan.LAYOUTS))
    for plan in result["plans"]:
        assert plan["parts"]["state_bytes"] == 12 * parameters
        assert plan["save"]["index_bytes"] > 5 * plan["parts"]["boxes"]
        assert plan["load"]["copies"] >= plan["load"]["pieces"] > 0
        assert 0 < plan["load"]["files"] <= 32
        for role in ("parts", "save", "load"):
            for phase in plan[role]["phases"].values():
                assert phase["seconds"] > 0
                assert phase["additional_bytes"] >= 0
        assert plan["save"]["peak_bytes"] > 0
