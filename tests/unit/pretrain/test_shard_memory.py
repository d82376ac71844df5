"""A rank of a large model makes its own share of it and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LARGE = [
    "precision=bf16",
    "parallel={zero_stage: 3, tensor: 8}",
    "batch={global_batch_size: 128, micro_batch_size: 1, ramp: []}",
]
BYTES_OWNED = 2 + 4 + 8  # the bf16 weight, its master, Adam's two moments
LIBRARIES = 300e6  # what DeepSpeed's modules and its bookkeeping of each parameter take


@pytest.mark.slow
@pytest.mark.parametrize("layers", [4, pytest.param(80, marks=pytest.mark.long)])
def test_a_rank_of_70b_under_zero_3_and_tensor_8(layers: int) -> None:
    """One of 1,024 ranks: its share of weights and optimizer, and one parameter of its shard at a time, in bf16."""
    recipe = ROOT / "launch" / "recipes" / "70b.yaml"
    command = [sys.executable, "-m", "tests.one_rank", "1024", "5", str(recipe), *LARGE, f"model.num_layers={layers}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=550)
    cost = json.loads(done.stdout.splitlines()[-1])
    assert cost["owned"] == pytest.approx(cost["shard"] / 128, rel=0.02)
    bound = BYTES_OWNED * cost["owned"] + 1.5 * 2 * cost["largest"] + LIBRARIES
    assert cost["increase"] < bound < 2 * cost["shard"], cost  # a shard that is not shared out, in bf16 alone
