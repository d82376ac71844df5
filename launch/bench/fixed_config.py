"""A recipe as a benchmark measures it: some keys are its own, and no override may change them."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.config import RunConfig


def fixed_config(
    recipe: str, settings: Sequence[str], fixed: Mapping[str, Any], overrides: Sequence[str]
) -> "RunConfig":
    """settings: KEY=VALUE of the benchmark, which `overrides` of the user may change. fixed: JSON values by key (of the
    config, or of one of its sections) that they may not.

    Raises ValueError if they do, or if there is no such recipe, or none that can be so.
    """
    from launch.run_folder import recipe_path
    from pretrain.recipe import load_config

    own = [f"{key}={json.dumps(value)}" for key, value in fixed.items()]
    config = load_config(recipe_path(recipe), [*settings, *own, *overrides])
    for key, value in fixed.items():
        section, _, name = key.rpartition(".")
        if (chosen := getattr(getattr(config, section) if section else config, name)) != value:
            raise ValueError(
                f"--set {key}={chosen}: what is measured has {json.dumps(value)}; leave it out, or see the options of "
                "the command"
            )
    return config
