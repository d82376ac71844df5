"""Overrides that reach into a preset's experts, by the road that a recipe takes."""

from pathlib import Path

import pytest

from pretrain.recipe import load_config

RECIPE = """
name: small
model: {preset: tiny-moe}
data: {sequence_length: 64, sources: [{name: a, path: nowhere}]}
batch: {global_batch_size: 2, micro_batch_size: 1}
optimizer: {lr: 1.0e-3}
schedule: {name: constant, total_steps: 10}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def test_one_field_of_the_experts(recipe: Path) -> None:
    moe = load_config(recipe, ["model.moe.experts=4", "model.moe.z_loss=0.001"]).model.moe
    assert moe is not None
    assert (moe.experts, moe.z_loss, moe.experts_per_token, moe.expert_ffn_size) == (4, 0.001, 2, 448)
    assert load_config(recipe).model.moe is not None
    assert load_config(recipe, ["model.moe=null"]).model.moe is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.moe.expert=4", "unknown key model.moe.expert: did you mean experts?"),
        ("model.moe.experts=1", "model.moe: experts_per_token 2 is more than experts 1"),
        ("model.moe.experts=0", "model.moe.experts=0: input should be greater than 0"),
        ("model.moe.first_layer=6", "model: moe.first_layer 6 leaves no layer with experts"),
        ("model={preset: tiny-10m, moe: {experts: 4}}", "model.moe.experts_per_token is missing"),
    ],
)
def test_a_wrong_field_is_one_line(recipe: Path, override: str, message: str) -> None:
    if override.startswith("model={"):
        recipe.write_text(RECIPE.replace("tiny-moe", "tiny-10m"))
    with pytest.raises(ValueError, match=message) as error:
        load_config(recipe, [override])
    assert "\n" not in str(error.value)
