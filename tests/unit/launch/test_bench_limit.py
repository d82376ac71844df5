"""The limit of `steppe bench train`: what a step's own operations are, and what they cost alone."""

from types import SimpleNamespace

import pytest
import torch

from launch.bench import train_limit
from launch.bench.train_limit import best_seconds, products_of, seconds_of_parts
from launch.bench.train_overhead import operator_costs, surplus
from model.accounting import flops_per_token
from model.config import ModelConfig
from tests.unit.launch.test_bench_peers import config_of

TOKENS = 10
SHAPE = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 96, "vocab_size": 128}
EXPERTS = {"experts": 8, "experts_per_token": 2, "expert_ffn_size": 24, "shared_experts": 1, "first_layer": 1}


@pytest.mark.parametrize("experts", [{}, {"moe": EXPERTS}])
def test_the_products_are_all_that_are_counted_as_flops(experts: dict[str, object]) -> None:
    """Six a parameter and token, over forward and the two gradients; each way to compute them does the same work."""
    model = ModelConfig.model_validate({**SHAPE, **experts})
    by_way = [[sum(N * D * R for N, D, R in way) for way in ways] for ways in products_of(model, TOKENS)]
    assert all(len(set(of_ways)) == 1 for of_ways in by_way)
    assert 6 * sum(of_ways[0] for of_ways in by_way) == TOKENS * flops_per_token(model, sequence_length=0)


def test_each_part_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_limit, "LEAST_SECONDS", 0)
    parts = seconds_of_parts(config_of({"num_kv_heads": 2}, "bf16"), torch.device("cpu"))
    assert list(parts) == ["matrix products", "attention", "adamw"]
    assert all(seconds > 0 for seconds in parts.values())


def test_the_best_of_several_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that a run moves: the first does not count."""
    took = iter([0.01, 3.0, 2.0, 5.0, 2.5, 4.0, 0.1])
    clock = [0.0]
    monkeypatch.setattr(train_limit, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def run() -> torch.Tensor:
        clock[0] += next(took)
        return torch.ones(())

    assert best_seconds(run) == 2.0
    assert list(took) == [0.1]


def test_only_what_is_added_is_itemised() -> None:
    def cost(seconds: float, calls: float = 1) -> dict[str, float]:
        return {"seconds": seconds, "calls": calls}

    bare = {"mm": cost(0.5, 9), "add": cost(0.2)}
    ours = {"mm": cost(0.6, 9), "add": cost(0.1), "copy": cost(0.3, 2), "small": cost(0.0005)}
    assert surplus(ours, bare) == [
        {"operator": "copy", "seconds": 0.3, "calls": 2},
        {"operator": "mm", "seconds": pytest.approx(0.1), "calls": 0},
    ]
    assert surplus(ours, bare, most=1) == surplus(ours, bare)[:1]


def test_operators_are_counted_a_step() -> None:
    x = torch.ones(8, 8)

    def run_steps(count: int) -> None:
        for _ in range(count):
            x @ x @ x

    costs = operator_costs(run_steps, 4)
    assert costs["aten::mm"]["calls"] == 2
    assert costs["aten::mm"]["seconds"] > 0
