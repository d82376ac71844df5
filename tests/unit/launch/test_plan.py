"""`steppe plan`: the length of a run, the layout that fits, and what is printed."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from launch.cli import app
from launch.gpus import GPUS, gpu_named
from launch.plan import make_plan, nearest_fit, run_length
from launch.run_folder import recipe_path
from pretrain.config import RunConfig
from pretrain.data_plan import stage_at
from pretrain.data_stages import Place
from pretrain.recipe import load_config
from pretrain.schedule import finished

RUNNER = CliRunner()
H100 = GPUS["h100-80g"]


def recipe(name: str, *overrides: str) -> RunConfig:
    return load_config(recipe_path(name), list(overrides))


@settings(max_examples=50)
@given(
    ramp=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 6)), max_size=3, unique_by=lambda pair: pair[0]),
    total=st.integers(1, 600),
    unit=st.sampled_from(["steps", "tokens"]),
)
def test_the_length_is_that_of_the_loop(ramp: list[tuple[int, int]], total: int, unit: str) -> None:
    config = recipe(
        "58m",
        "data.sequence_length=8",
        f"batch={{global_batch_size: 4, micro_batch_size: 1, ramp: {[list(pair) for pair in sorted(ramp)]}}}",
        f"schedule={{warmup_steps: null, total_steps: null, total_{unit}: {total}}}",
    )
    steps = tokens = 0
    while not finished(config.schedule, steps, tokens):
        steps, tokens = steps + 1, tokens + 8 * stage_at(config, Place(steps, 0, tokens), {}).batch_size(tokens)
    assert run_length(config) == (steps, tokens)


def test_a_layout_that_fits_is_left_alone() -> None:
    found = nearest_fit(recipe("7b"), 1, 8, H100)
    assert found is not None
    assert found.overrides == []
    assert make_plan(recipe("7b"), 1, 8, H100).fits


def test_a_higher_stage_comes_first() -> None:
    config = recipe("7b", "parallel={zero_stage: 1, activation_checkpointing: none}", "batch.micro_batch_size=2")
    found = nearest_fit(config, 1, 8, H100)
    assert found is not None
    assert found.overrides == ["parallel.zero_stage=2"]


def test_recomputation_comes_before_smaller_micro_batches() -> None:
    config = recipe("7b", "parallel.activation_checkpointing=none", "batch.micro_batch_size=8")
    found = nearest_fit(config, 1, 8, H100)
    assert found is not None
    assert found.overrides == ["parallel.activation_checkpointing=full"]


def test_tensor_parallelism_stays_within_a_node() -> None:
    config = recipe("70b", "data.sequence_length=65536", "batch={global_batch_size: 64, ramp: []}")
    found = nearest_fit(config, 8, 4, H100)
    assert found is not None
    assert "parallel.tensor=2" in found.overrides or "parallel.tensor=4" in found.overrides


def test_the_found_words_make_it_fit() -> None:
    given_words = ["parallel.zero_stage=1", "parallel.activation_checkpointing=none"]
    config = recipe("70b", *given_words)
    found = nearest_fit(config, 16, 8, H100)
    assert found is not None
    pasted = make_plan(recipe("70b", *given_words, *found.overrides), 16, 8, H100)
    assert pasted.fits
    assert pasted.memory == found.memory


def test_where_nothing_fits_none_is_said() -> None:
    assert nearest_fit(recipe("70b"), 1, 8, GPUS["a100-40g"]) is None
    said = RUNNER.invoke(app, ["plan", "70b", "--gpu", "a100-40g"]).stdout
    assert "No layout on these GPUs does" in said


def test_json_is_one_object_with_everything() -> None:
    done = RUNNER.invoke(
        app, ["plan", "70b", "--nodes", "16", "--gpu", "h100-80g", "--set", "parallel.tensor=8", "--json"]
    )
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["parameters"]["total"] == 70_553_706_496
    assert plan["layout"]["data"] == 16
    assert plan["layout"]["tensor"] == 8
    # The ramp's 512 sequences until 252 B tokens, 1024 from there.
    assert [batch["micro_batches"] for batch in plan["batches"]] == [32, 64]
    assert plan["tokens"] == pytest.approx(15e12, rel=1e-5)
    assert plan["steps"] == pytest.approx(252e9 / 2**22 + (15e12 - 252e9) / 2**23, rel=1e-4)
    memory = plan["memory"]
    assert memory["total"] == sum(
        memory[item] for item in ("weights", "gradients", "optimizer", "activations", "buffers")
    )
    assert memory["moment"] in [moment["moment"] for moment in plan["moments"]]
    assert plan["fits"]
    assert plan["nearest"]["set"] == []


def test_the_table_shows_what_to_paste() -> None:
    done = RUNNER.invoke(app, ["plan", "7b", "--gpu", "a100-40g", "--set", "parallel.zero_stage=1"])
    assert done.exit_code == 0
    assert "6,738,415,616" in done.stdout
    assert "  --set parallel.zero_stage=" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["7b", "--gpu", "h100-80g", "--set", "parallel.tensor=3"], "parallel.tensor=3 does not divide"),
        (["7b", "--gpu", "h100-80g", "--nodes", "3"], "global_batch_size=1024 is not a multiple"),
        (["7b", "--gpu", "h100"], "--gpu h100 is not known: choose from a100-40g"),
        (["7b", "--gpu", "h100-80g", "--nodes", "0"], "--nodes 0"),
    ],
)
def test_what_cannot_be_is_an_error_with_its_remedy(arguments: list[str], message: str) -> None:
    done = RUNNER.invoke(app, ["plan", *arguments])
    assert isinstance(done.exception, ValueError)
    assert message in str(done.exception)


def test_gpus_leave_headroom() -> None:
    for name, gpu in GPUS.items():
        assert gpu_named(name) is gpu
        assert 0.85 * gpu.memory_bytes < gpu.usable_bytes < gpu.memory_bytes
