import subprocess
import sys

import pytest
from pydantic import ValidationError

from data_pipeline.config import MIB, DataConfig, SourceConfig

SOURCE = {"name": "a", "path": "/data/a"}


def test_defaults() -> None:
    config = DataConfig(sequence_length=512, sources=(SourceConfig(**SOURCE),))
    assert config.shuffle_block_bytes == 64 * MIB
    assert config.sources[0].weight == 1.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sequence_length": 0}, "sequence_length"),
        ({"sources": []}, "sources is empty"),
        ({"sources": [SOURCE, SOURCE]}, "'a' is used twice"),
        ({"sources": [SOURCE | {"weight": 0}]}, "weight"),
        ({"sources": [SOURCE | {"weight": -1.0}]}, "weight"),
        ({"sources": [SOURCE | {"weight": float("inf")}]}, "weight"),
        ({"sources": [SOURCE | {"weight": float("nan")}]}, "weight"),
        ({"sources": [SOURCE | {"name": ""}]}, "name"),
        ({"sources": [SOURCE | {"wieght": 1}]}, "wieght"),
        ({"shuffle_block_bytes": 0}, "shuffle_block_bytes"),
        ({"shuffle_group_blocks": 0}, "shuffle_group_blocks"),
        ({"shuffle": True}, "shuffle"),
    ],
)
def test_broken_rules(change: dict, named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        DataConfig(**({"sequence_length": 8, "sources": [SOURCE]} | change))


def test_frozen() -> None:
    config = DataConfig(sequence_length=512, sources=(SourceConfig(**SOURCE),))
    with pytest.raises(ValidationError, match="frozen"):
        config.sequence_length = 1  # type: ignore[misc]


def test_config_and_loader_import_no_torch() -> None:
    light = "import sys, data_pipeline.config; assert not {'torch', 'numpy'} & set(sys.modules)"
    modules = "data_pipeline.loader, data_pipeline.preparation.job"
    heavy = f"import {modules}; assert not {{'torch', 'datasets'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{light}; {heavy}"], check=True)
