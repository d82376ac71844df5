"""Processes that come to a preparation when others are about to end it, or have: none hangs, none fails."""

import json
import multiprocessing
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.corpus.config import corpus_of
from data_pipeline.manifest import Manifest
from data_pipeline.preparation.job import Request, open_job, prepare_corpus
from data_pipeline.preparation.work_folder import UNFINISHED_NAME, WorkFolder
from tests.unit.data_pipeline.preparation.folders import files_of, sample_texts, write_corpus

FORK = multiprocessing.get_context("fork")
SECONDS = 30.0
"""Far more than any of this takes."""


@pytest.fixture
def request_(tokenizer_path: Path, tmp_path: Path) -> Request:
    corpus = corpus_of([write_corpus(tmp_path / "c", sample_texts(12), 3)])
    return Request(corpus, str(tokenizer_path), tmp_path / "d", unit_bytes=1)


def in_time(work: Callable[[], object]) -> None:
    """Call it, in a process of its own, which must end well and before it is too late."""
    process = FORK.Process(target=work)
    process.start()
    process.join(SECONDS)
    hangs = process.is_alive()
    process.kill()
    process.join()
    assert not hangs
    assert process.exitcode == 0


def test_who_looked_before_the_end_and_came_after_it(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    make = WorkFolder.make

    def finish_first(self: WorkFolder) -> None:
        monkeypatch.setattr(WorkFolder, "make", make)
        prepare_corpus(request_, 1)
        make(self)

    def join() -> None:
        monkeypatch.setattr(WorkFolder, "make", finish_first)
        assert prepare_corpus(request_, 1).documents == 12

    in_time(join)
    assert UNFINISHED_NAME not in files_of_folder(request_)


def test_who_came_before_the_folder_was_removed_and_waited_for_it(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = WorkFolder.make

    def finish_then(self: WorkFolder) -> None:
        monkeypatch.setattr(WorkFolder, "make", make)
        make(self)
        prepare_corpus(request_, 1)

    def join() -> None:
        monkeypatch.setattr(WorkFolder, "make", finish_then)
        assert prepare_corpus(request_, 1).documents == 12

    in_time(join)
    assert UNFINISHED_NAME not in files_of_folder(request_)


def files_of_folder(request: Request) -> set[str]:
    return {path.name for path in request.out.iterdir()}


def test_the_folder_stays_for_those_who_still_work(request_: Request) -> None:
    with open_job(request_) as slow:
        assert slow is not None
        prepare_corpus(request_, 1)
        assert slow.work.result("finish-000000") == {}
    assert UNFINISHED_NAME in files_of_folder(request_)
    prepare_corpus(request_, 1)
    assert UNFINISHED_NAME not in files_of_folder(request_)


def test_bins_are_asked_for_while_the_last_ones_leave(request_: Request) -> None:
    with open_job(request_):
        prepare_corpus(request_, 1)
        packing = threading.Thread(target=prepare_corpus, args=(with_pack(request_), 1), daemon=True)
        packing.start()
        packing.join(0.3)
        assert packing.is_alive()
    packing.join(SECONDS)
    assert [pack.sequence_length for pack in Manifest.load(request_.out).packs] == [64]


def with_pack(request: Request) -> Request:
    return Request(request.corpus, request.tokenizer_path, request.out, unit_bytes=1, packs=(64,))


def test_all_are_told_that_nothing_is_left(request_: Request, tmp_path: Path) -> None:
    for path in (tmp_path / "c").iterdir():
        path.write_text(json.dumps({"another": 1}) + "\n")

    def joins() -> None:
        with pytest.raises(ValueError, match="no document in .* .3 broken records"):
            prepare_corpus(request_, 1)

    with open_job(request_):
        in_time(joins)
        in_time(joins)
        assert request_.out.exists()
    in_time(joins)
    assert not request_.out.exists()


@pytest.mark.slow
def test_joiners_spread_over_the_end_of_a_job(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small jobs, each with several processes that start at any moment of it."""
    monkeypatch.setattr("data_pipeline.preparation.workers.LOOK_SECONDS", 0.01)
    rng = random.Random(0)
    prepare_corpus(request_, 1)
    expected = files_of(request_.out)
    for _ in range(40):
        shutil.rmtree(request_.out)
        joiners = [FORK.Process(target=late, args=(request_, rng.random() * 0.15)) for _ in range(5)]
        for joiner in joiners:
            joiner.start()
        deadline = time.monotonic() + SECONDS
        for joiner in joiners:
            joiner.join(max(0.0, deadline - time.monotonic()))
        hanging = [joiner for joiner in joiners if joiner.is_alive()]
        for joiner in hanging:
            joiner.kill()
        assert not hanging
        assert [joiner.exitcode for joiner in joiners] == [0] * len(joiners)
        assert files_of(request_.out) == expected


def late(request: Request, seconds: float) -> None:
    time.sleep(seconds)
    prepare_corpus(request, 1)
