"""The recipes that come with Steppe, on the machines they name."""

import re

import pytest

from launch.gpus import gpu_named
from launch.plan import make_plan
from launch.run_folder import RECIPES
from pretrain.recipe import load_config

NAMED = {
    path.stem: found.groups()
    for path in sorted(RECIPES.glob("*.yaml"))
    if (found := re.search(r"steppe plan (\S+) --nodes (\d+) --gpu (\S+)", path.read_text()))
}


def test_recipes_name_machines() -> None:
    assert {"mixtral-8x7b", "qwen3-30b-a3b"} <= NAMED.keys()


@pytest.mark.parametrize("recipe", NAMED)
def test_a_recipe_fits_on_the_nodes_it_names(recipe: str) -> None:
    name, nodes, gpu = NAMED[recipe]
    assert name == recipe
    assert make_plan(load_config(RECIPES / f"{recipe}.yaml"), int(nodes), 8, gpu_named(gpu)).fits
