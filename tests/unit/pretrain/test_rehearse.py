"""A step as some ranks of a layout that is not there."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from model.parameters import parameter_shapes
from pretrain.random_batch import random_batch
from pretrain.recipe import dump_config
from pretrain.rehearse import step_as
from tests.small_run import MODELS, small_config


def test_random_batches() -> None:
    """Reproducible, of the run's shape, within the vocabulary, with documents only where the model keeps them apart."""
    config = small_config()
    batch = random_batch(config, 0)
    assert batch.tokens.shape == batch.targets.shape == (2, 24)
    assert batch.tokens.max() < 300
    assert batch.document_ids is None
    assert (batch.tokens == random_batch(config, 0).tokens).all()
    assert (batch.tokens != random_batch(config, 1).tokens).any()
    masked = random_batch(small_config("model.document_mask=true"), 0)
    assert masked.document_ids is not None
    assert set(masked.document_ids.flat) == {0, 1}
    assert masked.valid_tokens == 2 * 23


def rehearsed(folder: Path, world: int, ranks: list[int], *overrides: str) -> str:
    """What the module says of these ranks, in a process of its own: DeepSpeed keeps groups in globals."""
    dump_config(small_config(*overrides), folder / "config.yaml")
    command = [sys.executable, "-P", "-m", "pretrain.rehearse", str(folder / "config.yaml"), str(world)]
    done = subprocess.run([*command, *map(str, ranks)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_ranks_of_a_layout_share_out_the_model(tmp_path: Path) -> None:
    """ZeRO 3 over 4 ranks: what they update is the model, once."""
    said = rehearsed(tmp_path, 4, [0, 1, 2, 3], "parallel.zero_stage=3")
    owned = [int(number) for number in re.findall(r"rank \d of 4 made its step: (\d+) elements", said)]
    assert len(owned) == 4
    assert sum(owned) == sum(map(math.prod, parameter_shapes(small_config().model).values()))


@pytest.mark.slow
def test_ranks_of_a_cluster(tmp_path: Path) -> None:
    """Every axis at once, on 1,024 ranks."""
    said = rehearsed(
        tmp_path,
        1024,
        [0, 1023],
        "model={num_heads: 16, head_size: 8, document_mask: true}",
        f"model.moe={MODELS['moebias']}",
        "parallel={tensor: 4, sequence: 2, expert: 8, activation_checkpointing: full}",
        "batch={global_batch_size: 256, micro_batch_size: 1}",
    )
    assert re.findall(r"rank (\d+) of 1024 made its step", said) == ["0", "1023"]


def test_an_impossible_layout_leaves_no_group_behind() -> None:
    with pytest.raises(ValueError, match="does not divide 6 ranks: use a multiple of 4 ranks"):
        step_as(0, 6, small_config("parallel.tensor=4"))
    assert not dist.is_initialized()
