"""A whole preparation in this process: what stands in the folder, and what is refused."""

import base64
import json
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.corpus.config import CorpusConfig, corpus_of
from data_pipeline.manifest import Manifest
from data_pipeline.origins import ORIGIN_DTYPE, ORIGINS_NAME, parse_origin_files
from data_pipeline.preparation.job import Request, prepare, prepare_corpus
from data_pipeline.preparation.work_folder import UNFINISHED_NAME
from data_pipeline.preparation.workers import Progress
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.verify import verify
from tests.unit.data_pipeline.preparation.folders import documents_of, files_of, sample_texts, write_corpus


def test_every_document_is_stored_between_bos_and_eos(
    corpus: Path, texts: list[str], tokenizer: Tokenizer, tokenizer_path: Path, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    manifest = prepare([str(corpus)], tokenizer_path, tmp_path / "d", progress=seen.append)
    assert documents_of(tmp_path / "d") == [[1, *tokenizer.encode(text), 2] for text in texts]
    assert manifest == Manifest.load(tmp_path / "d")
    assert manifest.documents == len(texts)
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.tokenizer_fingerprint == tokenizer.fingerprint
    assert (manifest.bos_id, manifest.eos_id, manifest.vocab_size) == (1, 2, 1000)
    size = corpus.stat().st_size
    assert Progress("read", size, size) in seen
    assert [progress.phase for progress in seen] == sorted(
        (progress.phase for progress in seen), key=["read", "place", "pack", "finish"].index
    )
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        "manifest.json",
        "origins.json",
        "report.json",
        "shard_00000.bin",
        "shard_00000.idx",
        "shard_00000.origin",
        "shard_00000.xxh3",
        "tokenizer.model",
    ]
    verify(tmp_path / "d")


def test_threads_chunks_and_shards_change_no_token(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many threads, and how much text each is given, are of no consequence; units are."""
    corpus = corpus_of([write_corpus(tmp_path / "c", sample_texts(120), 6)])

    def run(name: str, workers: int, unit_bytes: int | None = 30_000) -> dict[str, bytes]:
        request = Request(corpus, str(tokenizer_path), tmp_path / name, 10_000, unit_bytes)
        prepare_corpus(request, workers)
        return files_of(tmp_path / name)

    first = run("1", 1)
    monkeypatch.setattr("data_pipeline.preparation.encoding.CHUNK_CHARACTERS", 5_000)
    assert sum(name.endswith(".bin") for name in first) > 6
    assert first == run("2", 2) == run("7", 7)
    assert documents_of(tmp_path / "1") == (run("whole", 2, None), documents_of(tmp_path / "whole"))[1]


@settings(max_examples=20)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8))
def test_any_text_comes_back(
    tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory, documents: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    prepare([str(folder / "c.jsonl")], tokenizer_path, folder / "d", workers=1)
    tokenizer = Tokenizer(folder / "d" / "tokenizer.model")
    stored = documents_of(folder / "d")
    assert [tokenizer.decode(document) for document in stored] == documents
    assert all(document[0] == 1 and document[-1] == 2 for document in stored)


def test_every_document_says_where_it_came_from(tokenizer: Tokenizer, tokenizer_path: Path, tmp_path: Path) -> None:
    texts = sample_texts(30)
    folder = write_corpus(tmp_path / "c", texts, 3)
    path = folder / "part_001.jsonl"
    path.write_text("broken\n" + path.read_text())
    corpus = CorpusConfig.model_validate({"inputs": [{"path": str(folder), "name": "words"}]})
    manifest = prepare_corpus(Request(corpus, str(tokenizer_path), tmp_path / "d", 4_000, 1), 1)
    content = (tmp_path / "d" / ORIGINS_NAME).read_bytes()
    files = parse_origin_files(content, ORIGINS_NAME)
    assert {file.input for file in files} == {"words"}
    parts = [np.fromfile(tmp_path / "d" / f"{shard.name}.origin", ORIGIN_DTYPE) for shard in manifest.shards]
    origins = np.concatenate(parts)
    assert len(origins) == 30
    for origin, stored in zip(origins, documents_of(tmp_path / "d"), strict=True):
        line = Path(files[origin["file"]].path).read_text().splitlines()[origin["index"]]
        text = json.loads(line)["text"]
        assert tokenizer.decode(stored) == text
        assert origin["text_bytes"] == len(text.encode())


def test_broken_records_are_quarantined_for_their_owner(tokenizer_path: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "c"
    corpus.mkdir()
    (corpus / "rows.jsonl").write_bytes(b'{"text": "good"}\n{"text": "bad \xff"}\nnothing\n')
    (corpus / "latin.txt").write_bytes(b"caf\xe9")
    (corpus / "image.png").write_bytes(b"\0")
    (corpus / ".hidden").write_bytes(b"x")
    manifest = prepare([str(corpus)], tokenizer_path, tmp_path / "d")
    assert (manifest.documents, manifest.quarantined, manifest.skipped_files) == (1, 3, 2)
    path = tmp_path / "d" / "quarantine.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(Path(record["path"]).name, record["line"], base64.b64decode(record["raw"])) for record in kept] == [
        ("latin.txt", 1, b"caf\xe9"),
        ("rows.jsonl", 2, b'{"text": "bad \xff"}\n'),
        ("rows.jsonl", 3, b"nothing\n"),
    ]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    counts = json.loads((tmp_path / "d" / "report.json").read_text())["inputs"]["c"]
    assert (counts["quarantined"], counts["skipped_files"]) == (3, 2)


@pytest.mark.parametrize("content", [b"", b"nothing but\nbroken lines\n"])
def test_an_empty_corpus_leaves_nothing(content: bytes, tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="no document in"):
        prepare([str(tmp_path / "c.jsonl")], tokenizer_path, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_the_same_request_leaves_a_finished_folder_as_it_is(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    first = prepare([str(corpus)], tokenizer_path, out)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    assert prepare([str(corpus)], tokenizer_path, out) == first
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before
    with pytest.raises(ValueError, match="exists and is finished, of other inputs"):
        prepare([str(corpus)], tokenizer_path, out, text_field="body")
    corpus_of_two = [str(corpus), str(Path(__file__))]
    with pytest.raises(ValueError, match="exists and is finished, of other inputs"):
        prepare(corpus_of_two, tokenizer_path, out)


def test_a_foreign_folder_is_refused(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "shard_of_mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="exists and holds other files"):
        prepare([str(corpus)], tokenizer_path, foreign)
    with pytest.raises(ValueError, match="is not a folder"):
        prepare([str(corpus)], tokenizer_path, foreign / "shard_of_mine.txt")
    assert files_of(foreign) == {"shard_of_mine.txt": b"precious"}


def test_bad_arguments(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers is 0"):
        prepare([str(corpus)], tokenizer_path, tmp_path / "d", workers=0)
    with pytest.raises(ValueError, match="tokenizer .* does not exist"):
        prepare([str(corpus)], tmp_path / "none.model", tmp_path / "d")
    with pytest.raises(ValueError, match="sequence length of 0"):
        prepare_corpus(Request(corpus_of([corpus]), str(tokenizer_path), tmp_path / "d", packs=(0,)))
    assert not (tmp_path / "d").exists()
    with pytest.raises(ValueError, match="input .* does not exist"):
        prepare([str(tmp_path / "none.jsonl")], tokenizer_path, tmp_path / "d")
    with pytest.raises(ValueError, match="no document in .*--text-field .now 'body'."):
        prepare([str(corpus)], tokenizer_path, tmp_path / "e", text_field="body")


def test_packs_are_planned_with_the_folder_or_later(tokenizer_path: Path, tmp_path: Path) -> None:
    corpus = corpus_of([write_corpus(tmp_path / "c", sample_texts(60), 4)])

    def run(name: str, *packs: int) -> Manifest:
        return prepare_corpus(Request(corpus, str(tokenizer_path), tmp_path / name, 20_000, 10_000, packs), 1)

    at_once = run("at_once", 256, 64)
    assert [pack.sequence_length for pack in at_once.packs] == [64, 256]
    assert run("later").packs == ()
    assert [pack.sequence_length for pack in run("later", 64).packs] == [64]
    run("later", 256)
    assert files_of(tmp_path / "later") == files_of(tmp_path / "at_once")
    verify(tmp_path / "later")


def test_an_unfinished_folder_goes_on_only_as_it_began(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = sample_texts(60)
    folder = write_corpus(tmp_path / "c", texts, 4)
    last = folder / "part_003.jsonl"
    good = last.read_bytes()
    gzipped = last.with_name("part_003.jsonl.gz")
    last.unlink()
    gzipped.write_bytes(b"\x1f\x8b\x08\0 torn")

    def run(out: Path, workers: int = 1, **changes: object) -> Manifest:
        request = Request(corpus_of([folder]), str(tokenizer_path), out, 20_000, 5_000, **changes)  # type: ignore[arg-type]
        return prepare_corpus(request, workers)

    out = tmp_path / "d"
    with pytest.raises(ValueError, match="part_003.*damaged"):
        run(out)
    assert {path.name for path in out.iterdir()} == {UNFINISHED_NAME}
    with pytest.raises(ValueError, match="is unfinished or no data folder"):
        Manifest.load(out)
    with pytest.raises(ValueError, match="unfinished preparation of other sequence lengths"):
        run(out, packs=(64,))
    with pytest.raises(ValueError, match="unfinished preparation of other inputs or settings"):
        prepare([folder], tokenizer_path, out, text_field="body")
    gzipped.unlink()
    last.write_bytes(good)
    with pytest.raises(ValueError, match=r"another state of the input files \(.*part_003.jsonl"):
        run(out)


def test_a_plan_of_which_nothing_is_done_gives_way(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """A mistake in the first minute needs no clearing up."""
    (tmp_path / "c.jsonl.gz").write_bytes(b"\x1f\x8b\x08\0 torn")
    with pytest.raises(ValueError, match="damaged"):
        prepare([tmp_path / "c.jsonl.gz"], tokenizer_path, tmp_path / "d")
    assert prepare([corpus], tokenizer_path, tmp_path / "d").documents > 0
    assert not (tmp_path / "d" / UNFINISHED_NAME).exists()
