import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.batch import Batch
from data_pipeline.config import CacheConfig, DataConfig, SourceConfig
from data_pipeline.loader import SAMPLES_AHEAD, TOKENS_AT_ONCE, Loader
from data_pipeline.order import Stage
from data_pipeline.pack_files import plan_packing
from data_pipeline.token_source import TokenSource
from tests.unit.data_pipeline.conftest import WriteFolder
from tests.unit.data_pipeline.test_verify import flip

T = 8
STAGES = [Stage(0, {"a": 3.0, "b": 1.0}, T), Stage(1001, {"b": 1.0}, T)]


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


def pairs(batches: list[Batch]) -> Counter[tuple[int, int]]:
    """Tokens and what follows each, where it counts."""
    counts: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        valid = batch.targets != -100
        counts.update(zip(batch.tokens[valid].tolist(), batch.targets[valid].tolist(), strict=True))
    return counts


def one_epoch(data: DataConfig, lengths: list[tuple[int, int]], size: int = 1, mask: bool = False) -> list[Batch]:
    """All that source a serves before it leaves after one epoch, by stages of (start, sequence length)."""
    stages = [Stage(start, {"a": 1.0}, length, {"a": 1}) for start, length in lengths]
    loader = Loader(data, 0, stages, 0, 1, size, mask, ((size * i, size) for i in itertools.count()))
    batches = []
    while loader.failure is None:
        batches += next(loader)
    with pytest.raises(ValueError, match="has no sample: .* were read max_epochs times"):
        next(loader)
    loader.close()
    return batches


def test_an_epoch_is_every_token_once_and_all_of_it_is_served(data: DataConfig) -> None:
    tokens = np.concatenate(numbered_documents(3, 900)).tolist()
    batches = one_epoch(data, [(0, T)])
    assert len(batches) == -(-(len(tokens) - 1) // T)
    assert pairs(batches) == Counter(itertools.pairwise(tokens))
    assert [int(batch.tokens[0, 0]) for batch in batches] != sorted(int(batch.tokens[0, 0]) for batch in batches)


def test_the_sequence_length_follows_the_stages(data: DataConfig) -> None:
    lengths = [(0, 8), (100, 12), (101, 30), (130, 5)]
    batches = one_epoch(data, lengths)
    for start, length in lengths:
        assert batches[start].tokens.shape == (1, length)
    assert [batch.tokens.shape[1] for batch in batches[101:130]] == [30] * 29
    tokens = np.concatenate(numbered_documents(3, 900)).tolist()
    # A window of several extents joins documents that the stream does not; nothing else differs.
    got, stored = pairs(batches), Counter(itertools.pairwise(tokens))
    assert Counter(first for first, _ in got.elements()) == Counter(tokens[:-1])
    assert all(first == 2 for first, _ in (got - stored))


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("lengths", [[(0, 16)], [(0, 16), (50, 24), (60, 16)]])
def test_best_fit_serves_whole_documents(data: DataConfig, lengths: list[tuple[int, int]], mask: bool) -> None:
    for length in (16, 24):
        plan_packing(data.sources[0].path, length, data.shuffle_block_bytes)
    batches = one_epoch(data.model_copy(update={"packing": "best_fit"}), lengths, mask=mask)
    expected: Counter[tuple[int, ...]] = Counter(map(tuple, numbered_documents(3, 900)))
    got: Counter[tuple[int, ...]] = Counter()
    for batch in batches:
        row, targets = batch.tokens[0].tolist(), batch.targets[0].tolist()
        assert all(row[t + 1] == targets[t] for t in range(len(row) - 1) if targets[t] != -100)
        documents = [row[i : i + 7] for i in range(0, len(row), 7) if row[i] == 1]
        assert row == [token for document in documents for token in document] + [2] * (len(row) - 7 * len(documents))
        assert targets[7 * len(documents) - 1 :] == [-100] * (len(row) - 7 * len(documents) + 1)
        got.update(map(tuple, documents))
        if mask:
            assert batch.positions is not None
            assert batch.positions[0, : 7 * len(documents)].tolist() == [*range(7)] * len(documents)
    assert got == expected


def test_what_ends_the_stream_without_eos(write_folder: WriteFolder) -> None:
    """Nothing follows its last token; as a target, its document ends there."""
    folder = write_folder("a", [[1, 7, 2], [1, 8]])
    plan_packing(folder, T, 640)
    sources = (SourceConfig(name="a", path=str(folder)),)
    data = DataConfig(sequence_length=T, sources=sources, shuffle_block_bytes=640, packing="best_fit")
    (batch,) = one_epoch(data, [(0, T)])
    assert batch.targets.tolist() == [[7, 2, 1, 8, 2, -100, -100, -100]]


def test_a_source_that_is_not_packed_as_the_run_wants_it(data: DataConfig) -> None:
    packed = data.model_copy(update={"packing": "best_fit"})
    with pytest.raises(ValueError, match=r"/a is not packed for sequence length 8 .*steppe data prepare .* --pack 8`"):
        one_epoch(packed, [(0, T)])
    plan_packing(data.sources[0].path, T, 1280)
    with pytest.raises(ValueError, match=r"/a is packed in shuffle blocks of 1280 bytes, .*shuffle_block_bytes is 640"):
        one_epoch(packed, [(0, T)])


def test_through_a_cache_the_batches_are_the_same(data: DataConfig, tmp_path: Path) -> None:
    cache = CacheConfig(folder=str(tmp_path / "cache"), max_bytes=1 << 28, local_sources=True)
    through_cache = load(data.model_copy(update={"cache": cache}))
    assert [rows(batches) for batches in through_cache] == [rows(batches) for batches in load(data)]
    assert any((tmp_path / "cache").rglob("shard_00000.bin/*"))


def test_what_will_be_read_is_announced_long_before(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[int] = []
    read: list[int] = []
    prefetch, read_runs = TokenSource.prefetch, TokenSource.read

    def note_prefetch(self: TokenSource, starts: np.ndarray, counts: np.ndarray) -> None:
        announced.extend(starts.tolist())
        prefetch(self, starts, counts)

    def note_read(self: TokenSource, starts: np.ndarray, *rest: np.ndarray) -> None:
        read.extend(starts.tolist())
        assert announced[: len(read)] == read
        ahead.append(len(announced) - len(read))
        read_runs(self, starts, *rest)

    ahead: list[int] = []
    monkeypatch.setattr("data_pipeline.loader.TOKENS_AT_ONCE", 16 * T)
    monkeypatch.setattr(TokenSource, "prefetch", note_prefetch)
    monkeypatch.setattr(TokenSource, "read", note_read)
    plan = ((16 * i, 16) for i in range(300))
    only_a = data.model_copy(update={"sources": data.sources[:1]})
    loader = Loader(only_a, 0, [Stage(0, {"a": 1.0}, T)], 0, 1, 16, False, plan)
    assert len(list(loader)) == 300
    assert len(read) == 4800
    assert ahead[0] == 0  # the first is waited for
    assert min(ahead[1:150]) >= SAMPLES_AHEAD - 16


def test_small_global_batches_are_read_at_once(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """But the first, which is waited for, and never two lengths; it makes no difference to the batches."""
    reads: list[int] = []
    read_runs = TokenSource.read

    def note_read(self: TokenSource, starts: np.ndarray, *rest: np.ndarray) -> None:
        reads.append(len(starts))
        read_runs(self, starts, *rest)

    monkeypatch.setattr(TokenSource, "read", note_read)
    only_a = data.model_copy(update={"sources": data.sources[:1]})
    stages = [Stage(0, {"a": 1.0}, T), Stage(240, {"a": 1.0}, 2 * T)]
    of_limit = {}
    for limit, expected in ((0, [8] * 40), (32 * T, [8, *[32] * 7, 8, *[16] * 5]), (TOKENS_AT_ONCE, [8, 232, 80])):
        monkeypatch.setattr("data_pipeline.loader.TOKENS_AT_ONCE", limit)
        reads.clear()
        loader = Loader(only_a, 0, stages, 0, 1, 4, True, ((8 * i, 8) for i in range(40)))
        of_limit[limit] = list(loader)
        assert reads == expected
    for limit in (32 * T, TOKENS_AT_ONCE):
        for at_once, alone in zip(of_limit[limit], of_limit[0], strict=True):
            assert len(at_once) == len(alone) == 2
            for one, other in zip(at_once, alone, strict=True):
                for name in ("tokens", "targets", "positions", "document_ids"):
                    array = getattr(one, name)
                    assert np.array_equal(array, getattr(other, name))
                    assert array.flags.c_contiguous
                    assert array.flags.writeable


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


@pytest.mark.parametrize("tokens_at_once", [0, 11 * T, TOKENS_AT_ONCE])
def test_a_failure_is_told_before_it_is_raised(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch, tokens_at_once: int
) -> None:
    monkeypatch.setattr("data_pipeline.loader.TOKENS_AT_ONCE", tokens_at_once)
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
    short = SourceConfig(name="b", path=str(write_folder("short", [[2]], vocab_size=60_000)))
    with pytest.raises(ValueError, match="'b', which has no data"):
        make((data.sources[0], short))
    missing = SourceConfig(name="b", path="/nowhere/at/all")
    with pytest.raises(ValueError, match="data folder /nowhere/at/all does not exist"):
        make((data.sources[0], missing))
