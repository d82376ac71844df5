"""The documents of a data folder in turn."""

import tracemalloc

import numpy as np
import pytest

from data_pipeline import documents as documents_module
from data_pipeline.documents import Documents
from data_pipeline.token_source import TokenSource
from tests.unit.data_pipeline.conftest import WriteFolder
from tests.unit.data_pipeline.far_folder import CHUNKS, TOKENS, serve_far_folder
from tests.unit.data_pipeline.test_verify import flip


@pytest.mark.parametrize("shard_bytes", [1 << 20, 400, 60])
@pytest.mark.parametrize("read_tokens", [1 << 20, 64, 1])
def test_documents_come_in_their_order(
    write_folder: WriteFolder, monkeypatch: pytest.MonkeyPatch, shard_bytes: int, read_tokens: int
) -> None:
    generator = np.random.default_rng(0)
    stored = [generator.integers(3, 1000, length).tolist() for length in [1, 70, *generator.integers(1, 40, 60), 2]]
    source = TokenSource(str(write_folder("a", stored, shard_bytes=shard_bytes)))
    monkeypatch.setattr(documents_module, "READ_TOKENS", read_tokens)
    for _ in range(2):
        got = list(Documents(source).in_order())
        assert [document.tolist() for document in got] == stored
        assert {document.dtype for document in got} == {source.dtype}
    source.close()


def test_a_folder_of_nothing(write_folder: WriteFolder) -> None:
    assert list(Documents(TokenSource(str(write_folder("a", [])))).in_order()) == []


def test_memory_holds_one_read(write_folder: WriteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 kB at once, of a folder of 4 MB."""
    monkeypatch.setattr(documents_module, "READ_TOKENS", 100_000)
    source = TokenSource(str(write_folder("a", [[7] * 1000] * 2000, shard_bytes=1 << 20)))
    read = Documents(source).in_order()
    next(read)
    tracemalloc.start()
    assert sum(len(document) for document in read) == 1_999_000
    assert tracemalloc.get_traced_memory()[1] < 700_000
    tracemalloc.stop()
    source.close()


def test_damage_is_found_where_it_is_read(write_folder: WriteFolder) -> None:
    folder = write_folder("a", [[7] * 1000] * 200)
    flip(folder / "shard_00000.bin", 300_000)
    with pytest.raises(ValueError, match=r"shard_00000.bin is damaged in block 4 .*steppe data verify"):
        list(Documents(TokenSource(str(folder))).in_order())


def test_a_far_folder_is_fetched_ahead_and_once(write_folder: WriteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "READ_TOKENS", 10_000)
    with serve_far_folder(write_folder, monkeypatch) as far:
        source = far.open()
        assert np.array_equal(np.concatenate(list(Documents(source).in_order())), TOKENS)
        assert len(far.server.gets(".bin")) == CHUNKS
        assert source.waits < CHUNKS
