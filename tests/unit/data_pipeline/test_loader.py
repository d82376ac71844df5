import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.batch import Batch
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.loader import Loader, validation_batches
from data_pipeline.order import Stage
from tests.unit.data_pipeline.conftest import WriteFolder
from tests.unit.data_pipeline.test_verify import flip

T = 8
STAGES = [Stage(0, {"a": 3.0, "b": 1.0}), Stage(1001, {"b": 1.0})]


def numbered_documents(first: int, count: int) -> list[list[int]]:
    """Documents whose windows can be told apart by their tokens."""
    return [[1, *range(first + 5 * i, first + 5 * i + 5), 2] for i in range(count)]


@pytest.fixture
def data(write_folder: WriteFolder) -> DataConfig:
    folders = {
        "a": write_folder("a", numbered_documents(3, 900), shard_bytes=3000, vocab_size=60_000),
        "b": write_folder("b", numbered_documents(20_000, 500), shard_bytes=2000, vocab_size=60_000),
    }
    sources = tuple(SourceConfig(name=name, path=str(folder)) for name, folder in folders.items())
    return DataConfig(sequence_length=T, sources=sources, shuffle_block_bytes=640, shuffle_group_blocks=3)


def load(
    data: DataConfig,
    rank: int = 0,
    world: int = 1,
    micro: int = 4,
    steps: int = 20,
    size: int = 16,
    mask: bool = False,
    seed: int = 0,
    first: int = 0,
) -> list[list[Batch]]:
    plan = ((first + i * size, size) for i in range(steps))
    loader = Loader(data, seed, STAGES, rank, world, micro, mask, plan)
    batches = list(loader)
    loader.close()
    return batches


def rows(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in np.hstack([batch.tokens, batch.targets[:, -1:]]).tolist()]


@pytest.mark.parametrize(("world", "micro"), [(1, 4), (1, 16), (2, 4), (4, 2), (4, 4), (16, 1)])
def test_the_global_batch_does_not_depend_on_the_layout(data: DataConfig, world: int, micro: int) -> None:
    whole = load(data, micro=16, steps=6)
    parts = [load(data, rank, world, micro, steps=6) for rank in range(world)]
    for step in range(6):
        assert all(batch.tokens.shape == (micro, T) for part in parts for batch in part[step])
        together = [row for part in parts for row in rows(part[step])]
        assert together == rows(whole[step])


def test_an_epoch_is_every_window_once(write_folder: WriteFolder) -> None:
    folder = write_folder("a", numbered_documents(3, 800), shard_bytes=3000, vocab_size=60_000)
    data = DataConfig(sequence_length=T, sources=(SourceConfig(name="a", path=str(folder)),), shuffle_block_bytes=640)
    windows = (800 * 7 - 1) // T
    loader = Loader(data, 0, [Stage(0, {"a": 1.0})], 0, 1, 1, False, iter([(0, windows), (windows, windows)]))
    tokens = np.concatenate(numbered_documents(3, 800))
    expected = Counter(tuple(tokens[w * T : w * T + T + 1].tolist()) for w in range(windows))
    first, second = (rows(batches) for batches in loader)
    assert Counter(first) == Counter(second) == expected
    assert first != second != sorted(expected)


def test_a_resume_continues_with_the_same_batches(data: DataConfig) -> None:
    whole = load(data, steps=100)
    resumed = load(data, first=60 * 16, steps=40)
    assert [rows(batches) for batches in resumed] == [rows(batches) for batches in whole[60:]]
    assert [rows(batches) for batches in load(data, seed=1)] != [rows(batches) for batches in whole[:20]]


def test_a_plan_may_skip_and_grow(data: DataConfig) -> None:
    plan = [(0, 4), (4, 8), (500, 4)]
    loader = Loader(data, 0, STAGES, 0, 1, 4, False, iter(plan))
    got = [row for batches in loader for row in rows(batches)]
    whole = [row for batches in load(data, steps=32) for row in rows(batches)]
    assert got == whole[:12] + whole[500:504]


def test_the_mixture_follows_the_stages(data: DataConfig) -> None:
    tokens = np.concatenate([batch.tokens for batches in load(data, steps=126) for batch in batches])
    of_b = np.array([max(row) >= 20_000 for row in tokens.tolist()])
    assert abs(of_b[:1001].mean() - 0.25) < 0.05
    assert of_b[1001:].all()


def test_the_mask_reaches_the_batches(data: DataConfig) -> None:
    batch = load(data, mask=True, steps=1)[0][0]
    assert batch.positions is not None
    assert batch.document_ids is not None
    assert np.array_equal(batch.targets == -100, batch.tokens == 2)
    assert not batch.positions[batch.tokens == 1].any()
    assert batch.document_ids.max() > 0


def test_a_failure_is_told_before_it_is_raised(data: DataConfig) -> None:
    flip(Path(data.sources[1].path) / "shard_00001.bin", 7)
    loader = Loader(data, 0, STAGES, 0, 1, 1, False, ((i, 1) for i in range(1000)))
    good = 0
    while (failure := loader.failure) is None:
        next(loader)
        good += 1
    assert good > 0
    assert isinstance(failure, ValueError)
    assert loader.failure is failure
    for _ in range(2):
        with pytest.raises(ValueError, match=r"shard_00001\.bin is damaged in block 0"):
            next(loader)
    loader.close()


def test_a_plan_that_fails(data: DataConfig) -> None:
    def plan() -> Iterator[tuple[int, int]]:
        yield (0, 4)
        raise RuntimeError("no more plans")

    loader = Loader(data, 0, STAGES, 0, 1, 4, False, plan())
    with pytest.raises(RuntimeError, match="no more plans"):
        list(loader)
    loader.close()


def test_the_end_is_no_failure(data: DataConfig) -> None:
    loader = Loader(data, 0, STAGES, 0, 1, 4, False, iter([(0, 4)]))
    assert loader.failure is None
    assert len(next(loader)) == 1
    assert loader.failure is None
    assert next(loader, None) is None
    assert next(loader, None) is None
    loader.close()


def test_close_stops_an_endless_loader(data: DataConfig) -> None:
    before = threading.active_count()
    loader = Loader(data, 0, STAGES, 0, 1, 4, False, ((i * 4, 4) for i in range(10**9)))
    next(loader)
    loader.close()
    loader.close()
    assert threading.active_count() == before


def test_unusable_sources(data: DataConfig, write_folder: WriteFolder) -> None:
    def make(sources: tuple[SourceConfig, ...], stages: list[Stage] = STAGES) -> Loader:
        return Loader(data.model_copy(update={"sources": sources}), 0, stages, 0, 1, 4, False, iter([]))

    with pytest.raises(ValueError, match="'b', which is not among data.sources"):
        make(data.sources[:1])
    short = SourceConfig(name="b", path=str(write_folder("short", [[1, 3, 2]], vocab_size=60_000)))
    with pytest.raises(ValueError, match="'b', which has no full window"):
        make((data.sources[0], short))
    missing = SourceConfig(name="b", path="/nowhere/at/all")
    with pytest.raises(ValueError, match="data folder /nowhere/at/all does not exist"):
        make((data.sources[0], missing))


def validate(
    data: DataConfig, micro: int, world: int, limit: int | None = None, mask: bool = False
) -> list[list[Batch]]:
    return [list(validation_batches(data.sources[0], T, micro, r, world, mask, limit)) for r in range(world)]


@pytest.mark.parametrize(("micro", "world"), [(1, 1), (4, 1), (3, 2), (5, 4), (1000, 2)])
@pytest.mark.parametrize("mask", [False, True])
def test_validation_scores_every_token_once(data: DataConfig, micro: int, world: int, mask: bool) -> None:
    ranks = validate(data, micro, world, mask=mask)
    assert len({len(batches) for batches in ranks}) == 1
    scored: Counter[int] = Counter()
    for batches in ranks:
        for batch in batches:
            assert batch.tokens.shape == (micro, T)
            scored.update(batch.targets[batch.targets != -100].tolist())
    stored = Counter(np.concatenate(numbered_documents(3, 900)).tolist())
    stored[1] -= 900 if mask else 1  # nothing predicts the first BOS; with a mask, no BOS
    assert scored == +stored


def test_validation_can_be_limited(data: DataConfig) -> None:
    ranks = validate(data, micro=3, world=2, limit=7)
    assert [len(batches) for batches in ranks] == [2, 2]
    assert sum(batch.valid_tokens for batches in ranks for batch in batches) == 7 * T
    assert [batches[-1].valid_tokens for batches in ranks] == [T, 0]


def test_validation_on_a_source_shorter_than_a_window(data: DataConfig, write_folder: WriteFolder) -> None:
    short = SourceConfig(name="s", path=str(write_folder("short", [[1, 9, 2]], vocab_size=60_000)))
    (batch,) = validation_batches(short, T, 2, 0, 1, False)
    assert batch.targets[0].tolist() == [9, 2] + [-100] * 6
    assert batch.valid_tokens == 2
