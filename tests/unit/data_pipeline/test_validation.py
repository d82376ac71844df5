from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.batch import Batch
from data_pipeline.config import CacheConfig, SourceConfig
from data_pipeline.validation import validation_batches
from tests.unit.data_pipeline.conftest import WriteFolder
from tests.unit.data_pipeline.test_loader import numbered_documents, rows

T = 8


@pytest.fixture
def source(write_folder: WriteFolder) -> SourceConfig:
    folder = write_folder("a", numbered_documents(3, 900), shard_bytes=3000, vocab_size=60_000)
    return SourceConfig(name="a", path=str(folder))


def validate(
    source: SourceConfig, micro: int, world: int, limit: int | None = None, mask: bool = False
) -> list[list[Batch]]:
    return [list(validation_batches(source, T, micro, r, world, mask, limit)) for r in range(world)]


@pytest.mark.parametrize(("micro", "world"), [(1, 1), (4, 1), (3, 2), (5, 4), (1000, 2)])
@pytest.mark.parametrize("mask", [False, True])
def test_validation_scores_every_token_once(source: SourceConfig, micro: int, world: int, mask: bool) -> None:
    ranks = validate(source, micro, world, mask=mask)
    assert len({len(batches) for batches in ranks}) == 1
    scored: Counter[int] = Counter()
    for batches in ranks:
        for batch in batches:
            assert batch.tokens.shape == (micro, T)
            scored.update(batch.targets[batch.targets != -100].tolist())
    stored = Counter(np.concatenate(numbered_documents(3, 900)).tolist())
    stored[1] -= 900 if mask else 1  # nothing predicts the first BOS; with a mask, no BOS
    assert scored == +stored


def test_validation_can_be_limited(source: SourceConfig) -> None:
    ranks = validate(source, micro=3, world=2, limit=7)
    assert [len(batches) for batches in ranks] == [2, 2]
    assert sum(batch.valid_tokens for batches in ranks for batch in batches) == 7 * T
    assert [batches[-1].valid_tokens for batches in ranks] == [T, 0]


def test_validation_on_a_source_shorter_than_a_window(write_folder: WriteFolder) -> None:
    short = SourceConfig(name="s", path=str(write_folder("short", [[1, 9, 2]], vocab_size=60_000)))
    (batch,) = validation_batches(short, T, 2, 0, 1, False)
    assert batch.targets[0].tolist() == [9, 2] + [-100] * 6
    assert batch.valid_tokens == 2


def test_validation_through_a_cache(source: SourceConfig, tmp_path: Path) -> None:
    cache = CacheConfig(folder=str(tmp_path / "cache"), max_bytes=1 << 28, local_sources=True)
    (expected,) = validate(source, 5, 1)
    got = list(validation_batches(source, T, 5, 0, 1, False, cache=cache))
    assert [rows([batch]) for batch in got] == [rows([batch]) for batch in expected]
    assert any((tmp_path / "cache").rglob("shard_00000.bin/*"))
