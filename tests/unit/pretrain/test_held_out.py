"""What of a held-out source is scored, and which rank is given which rows of it."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.batch import IGNORED_TARGET, Batch
from data_pipeline.config import SourceConfig
from data_pipeline.tokenizer import Tokenizer
from pretrain.config import RunConfig
from pretrain.evaluation.score import Score
from pretrain.held_out import HeldOut, rank_batches, read_held_out, row_widths
from pretrain.layout import Layout
from pretrain.parallel_dims import ParallelDims
from tests.held_out_folder import held_out_texts, write_held_out
from tests.small_run import small_config

BOS, EOS = 1, 2
EVERYTHING = 1 << 40


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceConfig:
    folder = write_held_out(tmp_path_factory.mktemp("held_out"), held_out_texts(), shard_bytes=2000)
    return SourceConfig(name="a", path=str(folder))


@pytest.fixture(scope="module")
def ids(source: SourceConfig) -> list[list[int]]:
    tokenizer = Tokenizer(Path(source.path) / "tokenizer.model")
    return [tokenizer.encode(text) for text in held_out_texts()]


def test_a_source_is_read_whole(source: SourceConfig, ids: list[list[int]]) -> None:
    held_out = read_held_out(source, EVERYTHING)
    assert [document.tolist() for document in held_out.documents] == ids
    assert (held_out.start_id, held_out.eos_id, held_out.cut) == (BOS, EOS, False)
    text_bytes = sum(len(text.encode()) for text in held_out_texts())
    assert held_out.counts == Score(tokens=sum(len(each) + 1 for each in ids), bytes=text_bytes, documents=len(ids))


def test_a_source_is_read_from_its_beginning_up_to_so_many_targets(source: SourceConfig, ids: list[list[int]]) -> None:
    tokenizer = Tokenizer(Path(source.path) / "tokenizer.model")
    stream = [token for document in ids for token in (*document, EOS)]
    for most_targets in range(2, 400):
        held_out = read_held_out(source, most_targets)
        targets = [target for window in held_out.windows(24) for target in window.targets.tolist()]
        assert targets == stream[:most_targets]
        assert (held_out.counts.tokens, held_out.counts.documents) == (most_targets, len(held_out.documents))
        text = "".join(tokenizer.decode(document) for document in held_out.documents)
        assert held_out.counts.bytes == len(text.encode())
        assert held_out.cut == (targets[-1] != EOS)


def test_a_window_is_of_one_document_and_begins_with_what_precedes_it(
    source: SourceConfig, ids: list[list[int]]
) -> None:
    (_, first, *_), windows = ids, list(read_held_out(source, EVERYTHING).windows(24))
    assert (windows[0].inputs.tolist(), windows[0].targets.tolist()) == ([BOS], [EOS])  # the empty document
    assert windows[1].inputs.tolist() == [BOS, *first[:23]]
    assert windows[2].inputs.tolist() == first[23:]
    assert windows[2].targets.tolist() == [*first[24:], EOS]


def test_documents_without_text_are_refused(tmp_path: Path) -> None:
    source = SourceConfig(name="blank", path=str(write_held_out(tmp_path, ["", ""])))
    with pytest.raises(ValueError, match=r"blank: the held-out documents of .* hold no text"):
        read_held_out(source, EVERYTHING)


def test_damage_is_told(tmp_path: Path) -> None:
    folder = write_held_out(tmp_path, held_out_texts(5))
    (shard,) = folder.glob("*.bin")
    shard.write_bytes(b"\xff" + shard.read_bytes()[1:])
    with pytest.raises(ValueError, match="damaged in block 0"):
        read_held_out(SourceConfig(name="a", path=str(folder)), EVERYTHING)
    with pytest.raises(ValueError, match="does not exist"):
        read_held_out(SourceConfig(name="a", path=str(tmp_path / "nowhere")), EVERYTHING)


def test_widths_are_a_few_halves_that_divide() -> None:
    assert row_widths(4096, 1) == [4096, 2048, 1024, 512, 256]
    assert row_widths(4096, 1024) == [4096, 2048, 1024]
    assert row_widths(24, 4) == [24, 12]
    assert row_widths(24, 8) == [24]
    assert row_widths(7, 1) == [7]


def shares(held_out: HeldOut, config: RunConfig, data_world: int) -> list[list[Batch]]:
    """The batches of each data-parallel rank, of which all ranks that work on the same sequences have the same."""
    parallel = config.parallel
    layout = Layout(data_world * parallel.ranks_per_sample, parallel.tensor, parallel.sequence)
    by_rank = [rank_batches(held_out, config, ParallelDims(layout, rank, {})) for rank in range(layout.world)]
    return by_rank[:: parallel.ranks_per_sample]


def rows_of(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The inputs and targets of each row that has any, without the padding."""
    counts = (batch.targets != IGNORED_TARGET).sum(axis=1).tolist()
    assert all((targets[count:] == IGNORED_TARGET).all() for targets, count in zip(batch.targets, counts, strict=True))
    rows = zip(batch.tokens.tolist(), batch.targets.tolist(), counts, strict=True)
    return [(tuple(tokens[:count]), tuple(targets[:count])) for tokens, targets, count in rows if count]


@given(
    lengths=st.lists(st.integers(0, 100), min_size=1, max_size=30),
    cut=st.booleans(),
    T=st.sampled_from((8, 12, 24, 32)),
    micro=st.integers(1, 5),
    data_world=st.integers(1, 5),
    degrees=st.sampled_from(((1, 1), (2, 1), (1, 2), (2, 2))),
    compiled=st.booleans(),
)
def test_each_window_is_in_one_row_and_ranks_compute_alike(
    lengths: list[int], cut: bool, T: int, micro: int, data_world: int, degrees: tuple[int, int], compiled: bool
) -> None:
    config = small_config(
        f"data.sequence_length={T}",
        f"batch.micro_batch_size={micro}",
        f"parallel={{tensor: {degrees[0]}, sequence: {degrees[1]}, compile: {str(compiled).lower()}}}",
    )
    documents = tuple(np.arange(3, 3 + length, dtype=np.int32) for length in (*lengths[:-1], lengths[-1] + cut))
    held_out = HeldOut(documents, BOS, EOS, cut, Score())
    by_rank = shares(held_out, config, data_world)

    shapes = [[batch.tokens.shape for batch in batches] for batches in by_rank]
    assert shapes == [shapes[0]] * data_world
    assert all(rows * width <= micro * T for rows, width in shapes[0])
    assert all(width % config.parallel.ranks_per_sample == 0 for _, width in shapes[0])
    assert len({width for _, width in shapes[0]}) <= 5
    assert not compiled or set(shapes[0]) == {(micro, T)}
    found = Counter(row for batches in by_rank for batch in batches for row in rows_of(batch))
    expected = Counter((tuple(w.inputs.tolist()), tuple(w.targets.tolist())) for w in held_out.windows(T))
    assert found == expected
    rows = [sum(len(rows_of(batch)) for batch in batches) for batches in by_rank]
    assert max(rows) - min(rows) <= len({width for _, width in shapes[0]})
