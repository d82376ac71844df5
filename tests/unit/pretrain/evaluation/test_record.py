"""Records of documents: exact, of whole blocks only, whatever a kill or a full disk left behind them."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.evaluation.record import (
    DocumentScore,
    DocumentSet,
    PositionScore,
    RecordsWriter,
    done,
    position_of,
    read_positions,
    read_scores,
)


def score(index: int, nats: float = 0.1) -> DocumentScore:
    return DocumentScore(index, "код", nats + index, 3, 10, 2, f"{index:016x}")


def write(folder: Path, rank: int, indices: list[int], block_seconds: float = 3600.0) -> None:
    with RecordsWriter(folder, rank, block_seconds) as records:
        for index in indices:
            records.add(score(index), np.array([1, 0, 2]), np.array([0.1, 0.0, float(index)]))


def rank_file(folder: Path, rank: int = 0) -> Path:
    return folder / "records" / f"rank_{rank:05d}.jsonl"


def indices_in(folder: Path) -> list[int]:
    return sorted(score.index for score in read_scores(folder))


def test_what_is_written_is_read_digit_for_digit(tmp_path: Path) -> None:
    write(tmp_path, 0, [0, 2, 4])
    write(tmp_path, 1, [1, 3])
    assert sorted(read_scores(tmp_path), key=lambda one: one.index) == [score(index) for index in range(5)]
    assert read_positions(tmp_path) == [
        PositionScore(0, 0, 5, math.fsum([0.1 + 0.1 + 0.1, 0.1 + 0.1])),
        PositionScore(2, 3, 10, 10.0),
    ]
    documents, text_bytes = done(tmp_path)
    assert len(documents) == 5
    assert text_bytes == 50


def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    assert list(read_scores(tmp_path)) == []
    assert read_positions(tmp_path) == []


def test_blocks_are_written_while_it_runs(tmp_path: Path) -> None:
    with RecordsWriter(tmp_path, 0, block_seconds=0.0) as records:
        for index in range(3):
            records.add(score(index), np.array([3]), np.array([1.5]))
            assert indices_in(tmp_path) == list(range(index + 1))
    assert read_positions(tmp_path) == [PositionScore(0, 0, 9, 4.5)]


def test_an_exception_keeps_what_is_done(tmp_path: Path) -> None:
    def interrupted() -> None:
        with RecordsWriter(tmp_path, 0) as records:
            records.add(score(0), np.array([3]), np.array([1.5]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert indices_in(tmp_path) == [0]


def test_any_torn_tail_costs_its_block_and_no_more(tmp_path: Path) -> None:
    write(tmp_path, 0, [0, 1])
    first_block = rank_file(tmp_path).read_bytes()
    write(tmp_path, 0, [2, 3])
    both = rank_file(tmp_path).read_bytes()
    assert both.startswith(first_block)
    for length in range(len(first_block), len(both), 5):
        rank_file(tmp_path).write_bytes(both[:length])
        assert indices_in(tmp_path) == [0, 1]
        assert sum(position.tokens for position in read_positions(tmp_path)) == 6
    for length in (len(first_block) + 1, len(first_block) + 150, len(both) - 1):
        rank_file(tmp_path).write_bytes(both[:length])
        write(tmp_path, 0, [4])
        assert indices_in(tmp_path) == [0, 1, 4]
        assert all(json.loads(line) for line in rank_file(tmp_path).read_bytes().splitlines())


def test_a_document_that_is_there_twice_is_told(tmp_path: Path) -> None:
    write(tmp_path, 0, [0, 1, 2])
    write(tmp_path, 1, [3, 1])
    with pytest.raises(ValueError, match="holds document 1 twice.*: remove it, and evaluate anew"):
        done(tmp_path)


def test_damage_is_told(tmp_path: Path) -> None:
    write(tmp_path, 0, [0, 1])
    lines = rank_file(tmp_path).read_bytes().splitlines(keepends=True)
    rank_file(tmp_path).write_bytes(b"".join([lines[0], bytes(len(lines[1]) - 1) + b"\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"rank_00000.jsonl is damaged .*evaluate again in a new folder"):
        indices_in(tmp_path)


def test_all_is_on_the_disk_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    write(tmp_path, 0, [0, 1])
    assert synced == [rank_file(tmp_path).stat().st_size]


def test_a_disk_that_fills_up_leaves_whole_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 0, [0])
    real = os.pwrite

    def half(descriptor: int, data: bytes, offset: int) -> int:
        if offset + len(data) > limit:
            if offset < limit:
                return real(descriptor, data[: limit - offset], offset)
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    limit = rank_file(tmp_path).stat().st_size + 100
    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 0, [1, 2])
    assert indices_in(tmp_path) == [0]
    limit = 1 << 20
    write(tmp_path, 0, [1, 2])
    assert indices_in(tmp_path) == [0, 1, 2]


@given(st.integers(0, 2**31))
def test_ranges_of_context_double(context: int) -> None:
    position = int(position_of(np.array([context]))[0])
    assert (1 << position) >> 1 <= context < 1 << position


@given(st.lists(st.integers(0, 500)))
def test_a_set_of_documents_is_a_set(indices: list[int]) -> None:
    documents = DocumentSet()
    for index in indices:
        documents.add(index)
    assert [index for index in range(600) if index in documents] == sorted(set(indices))
    assert len(documents) == len(set(indices))
