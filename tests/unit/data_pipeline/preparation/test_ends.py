"""A preparation that dies at its very end, when shards are in their places or the manifest is written."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.corpus.config import corpus_of
from data_pipeline.manifest import Manifest
from data_pipeline.preparation.finish_phases import PlacePhase
from data_pipeline.preparation.job import Request, prepare, prepare_corpus
from data_pipeline.preparation.phase import OnBytes
from data_pipeline.preparation.read_phase import ReadPhase
from data_pipeline.preparation.work_folder import UNFINISHED_NAME, Claim, WorkFolder
from tests.unit.data_pipeline.preparation.folders import files_of


def die_before_the_removal(request: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preparation whose folder is finished, but for the removal of the work folder."""

    def die(self: WorkFolder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(WorkFolder, "remove_unless_in_use", die)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(request, 1)


def test_a_death_right_after_the_manifest_leaves_nothing_behind(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "d"

    die_before_the_removal(Request(corpus_of([corpus]), str(tokenizer_path), out), monkeypatch)
    assert WorkFolder(out).path.exists()
    assert prepare([corpus], tokenizer_path, out) == Manifest.load(out)
    assert not WorkFolder(out).path.exists()


def test_after_a_death_right_after_the_manifest_bins_can_be_asked_for(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(corpus_of([corpus]), str(tokenizer_path), tmp_path / "d")
    die_before_the_removal(request, monkeypatch)
    packed = prepare_corpus(replace(request, packs=(64,)), 1)
    assert [pack.sequence_length for pack in packed.packs] == [64]
    assert not WorkFolder(request.out).path.exists()


def test_a_removal_that_was_cut_short_is_in_nobodys_way(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "new", tmp_path / "finished"):
        if out.name == "finished":
            prepare([corpus], tokenizer_path, out)
        torn = out / f"{UNFINISHED_NAME}.0123456789abcdef.tmp"
        (torn / "units").mkdir(parents=True)
        (torn / "units" / "shard_00000.bin").touch()
        prepare([corpus], tokenizer_path, out)
        assert not torn.exists()
    assert files_of(tmp_path / "new") == files_of(tmp_path / "finished")


def test_shards_that_were_lost_are_no_finished_folder(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Be it by a file system, or by a machine that did a unit again of which the shards were in their places."""
    place = PlacePhase.do

    def lose(phase: PlacePhase, task: int, threads: int, on_bytes: OnBytes) -> dict[str, Any]:
        (phase.job.work.unit_path(0) / "shard_00000.bin").unlink()
        return place(phase, task, threads, on_bytes)

    def tear(phase: PlacePhase, task: int, threads: int, on_bytes: OnBytes) -> dict[str, Any]:
        os.truncate(phase.job.work.unit_path(0) / "shard_00000.bin", 100)
        return place(phase, task, threads, on_bytes)

    for attempt, words in ((lose, "shard_00000.bin is missing"), (tear, "shard_00000.bin has 100 bytes instead of")):
        out = tmp_path / attempt.__name__
        monkeypatch.setattr(PlacePhase, "do", attempt)
        with pytest.raises(ValueError, match=f"{words}.*remove .*{UNFINISHED_NAME} and start again"):
            prepare([corpus], tokenizer_path, out)
        monkeypatch.setattr(PlacePhase, "do", place)
        assert not (out / "manifest.json").exists()


def test_a_task_that_was_finished_without_a_word_is_not_done_again(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(claim: Claim) -> None:
        raise KeyboardInterrupt

    def refuse(phase: ReadPhase, *rest: object) -> dict[str, Any]:
        raise AssertionError

    with monkeypatch.context() as patched:
        patched.setattr(Claim, "announce", die)
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], tokenizer_path, tmp_path / "d")
    assert WorkFolder(tmp_path / "d").tasks_done() == set()
    monkeypatch.setattr(ReadPhase, "do", refuse)
    prepare([corpus], tokenizer_path, tmp_path / "d")


def test_a_place_that_was_begun_goes_on(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.replace

    def die_at_the_index(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "d" / "shard_00000.idx":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", die_at_the_index)
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], tokenizer_path, tmp_path / "d")
    assert (tmp_path / "d" / "shard_00000.bin").exists()
    prepare([corpus], tokenizer_path, tmp_path / "d")
    prepare([corpus], tokenizer_path, tmp_path / "clean")
    assert files_of(tmp_path / "d") == files_of(tmp_path / "clean")
