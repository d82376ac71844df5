import base64
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.manifest import Manifest
from data_pipeline.prepare import UNFINISHED_NAME, Progress, prepare
from data_pipeline.shards import read_index
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.verify import verify


def documents_of(folder: Path) -> list[list[int]]:
    """Read as a stranger would: the index, then the tokens it points to."""
    manifest = Manifest.load(folder)
    documents = []
    for shard in manifest.shards:
        lengths, offsets = read_index(folder / f"{shard.name}.idx")
        content = (folder / f"{shard.name}.bin").read_bytes()
        for length, offset in zip(lengths.tolist(), offsets.tolist(), strict=True):
            documents.append(np.frombuffer(content, manifest.numpy_dtype, length, offset).tolist())
    return documents


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    assert seen[-1] == Progress(
        corpus.stat().st_size, corpus.stat().st_size, manifest.text_bytes, len(texts), manifest.tokens
    )
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        "manifest.json",
        "shard_00000.bin",
        "shard_00000.idx",
        "shard_00000.xxh3",
        "tokenizer.model",
    ]
    verify(tmp_path / "d")


def test_the_number_of_workers_changes_no_byte(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.prepare.CHUNK_CHARACTERS", 10_000)
    for workers in (1, 2, 7):
        prepare([str(corpus)], tokenizer_path, tmp_path / str(workers), workers=workers, shard_bytes=50_000)
    monkeypatch.setattr("data_pipeline.prepare.CHUNK_CHARACTERS", 1_000_000)
    prepare([str(corpus)], tokenizer_path, tmp_path / "chunk", shard_bytes=50_000)
    first = files_of(tmp_path / "1")
    assert sum(name.endswith(".bin") for name in first) > 3
    assert first == files_of(tmp_path / "2") == files_of(tmp_path / "7") == files_of(tmp_path / "chunk")


@settings(deadline=None, max_examples=25)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8))
def test_any_text_comes_back(
    tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory, documents: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    prepare([str(folder / "c.jsonl")], tokenizer_path, folder / "d")
    tokenizer = Tokenizer(folder / "d" / "tokenizer.model")
    stored = documents_of(folder / "d")
    assert [tokenizer.decode(document) for document in stored] == documents
    assert all(document[0] == 1 and document[-1] == 2 for document in stored)


def test_broken_records_are_quarantined(tokenizer_path: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "c"
    corpus.mkdir()
    (corpus / "rows.jsonl").write_bytes(b'{"text": "good"}\n{"text": "bad \xff"}\nnothing\n')
    (corpus / "latin.txt").write_bytes(b"caf\xe9")
    (corpus / "image.png").write_bytes(b"\0")
    manifest = prepare([str(corpus)], tokenizer_path, tmp_path / "d")
    assert (manifest.documents, manifest.quarantined, manifest.skipped_files) == (1, 3, 1)
    kept = [json.loads(line) for line in (tmp_path / "d" / "quarantine.jsonl").read_text().splitlines()]
    assert [(Path(record["path"]).name, record["line"], base64.b64decode(record["raw"])) for record in kept] == [
        ("latin.txt", 1, b"caf\xe9"),
        ("rows.jsonl", 2, b'{"text": "bad \xff"}\n'),
        ("rows.jsonl", 3, b"nothing\n"),
    ]
    assert "invalid UTF-8" in kept[0]["reason"]


@pytest.mark.parametrize("content", [b"", b"nothing but\nbroken lines\n"])
def test_an_empty_corpus_leaves_nothing(content: bytes, tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="no document in"):
        prepare([str(tmp_path / "c.jsonl")], tokenizer_path, tmp_path / "d")
    assert not list((tmp_path / "d").iterdir())


def test_a_finished_or_foreign_folder_is_refused(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    prepare([str(corpus)], tokenizer_path, out)
    before = files_of(out)
    with pytest.raises(ValueError, match="exists and is finished"):
        prepare([str(corpus)], tokenizer_path, out)
    assert files_of(out) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "shard_of_mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="exists and holds other files"):
        prepare([str(corpus)], tokenizer_path, foreign)
    with pytest.raises(ValueError, match="is not a folder"):
        prepare([str(corpus)], tokenizer_path, foreign / "shard_of_mine.txt")
    assert files_of(foreign) == {"shard_of_mine.txt": b"precious"}


def test_a_killed_job_is_unfinished_and_its_rerun_is_whole(
    corpus: Path, texts: list[str], tokenizer_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "d"
    code = f"""if True:
        import os, time, data_pipeline.prepare as p
        p.CHUNK_CHARACTERS = 1000
        def wait(progress):
            if progress.documents > 10:
                print("ready", flush=True)
                time.sleep(60)
        p.prepare([{str(corpus)!r}], {str(tokenizer_path)!r}, {str(out)!r}, progress=wait, shard_bytes=20_000)
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
    left = {path.name for path in out.iterdir()}
    assert UNFINISHED_NAME in left
    assert "shard_00000.bin" in left
    with pytest.raises(ValueError, match="is unfinished or no data folder"):
        Manifest.load(out)
    assert prepare([str(corpus)], tokenizer_path, out).documents == len(texts)
    prepare([str(corpus)], tokenizer_path, tmp_path / "clean")
    assert files_of(out) == files_of(tmp_path / "clean")


def test_a_worker_that_fails_fails_the_job(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.prepare.CHUNK_CHARACTERS", 10_000)
    encode_batch = Tokenizer.encode_batch

    def fail_late(self: Tokenizer, texts: list[str]) -> list[np.ndarray]:
        if any("quick brown fox" in text for text in texts):
            raise MemoryError("no memory left")
        return encode_batch(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", fail_late)
    with pytest.raises(MemoryError, match="no memory left"):
        prepare([str(corpus)], tokenizer_path, tmp_path / "d", workers=2)
    assert not list((tmp_path / "d").iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_passes_through_and_leaves_nothing(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "d"

    def fill_the_disk(progress: Progress) -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        for descriptor in os.listdir("/proc/self/fd"):
            target = Path("/proc/self/fd", descriptor)
            if target.is_symlink() and os.readlink(target).endswith(".bin.tmp"):
                os.dup2(full, int(descriptor))
        os.close(full)

    with pytest.raises(OSError, match="No space left"):
        prepare([str(corpus)], tokenizer_path, out, progress=fill_the_disk)
    assert not list(out.iterdir())


def test_bad_arguments(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers is 0"):
        prepare([str(corpus)], tokenizer_path, tmp_path / "d", workers=0)
    with pytest.raises(ValueError, match="tokenizer .* does not exist"):
        prepare([str(corpus)], tmp_path / "none.model", tmp_path / "d")
    with pytest.raises(ValueError, match="input .* does not exist"):
        prepare([str(tmp_path / "none.jsonl")], tokenizer_path, tmp_path / "d")
    with pytest.raises(ValueError, match="no document in .*--text-field .now 'body'."):
        prepare([str(corpus)], tokenizer_path, tmp_path / "e", text_field="body")
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
def test_memory_stays_bounded(tokenizer_path: Path, tmp_path: Path) -> None:
    """Ten times the text must not take ten times the memory."""
    text = json.dumps({"text": "some words of a document that is not long. " * 50}) + "\n"
    corpus = tmp_path / "c.jsonl"
    peaks_kb = []
    for lines in (2_000, 20_000):
        corpus.write_text(text * lines)
        code = f"""if True:
            import re, data_pipeline.prepare as p
            p.prepare([{str(corpus)!r}], {str(tokenizer_path)!r}, {str(tmp_path / str(lines))!r}, workers=2)
            print(re.search("VmHWM:\\\\s+(\\\\d+)", open("/proc/self/status").read())[1])
        """
        peaks_kb.append(int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout))
    assert peaks_kb[1] < peaks_kb[0] + 20_000, peaks_kb  # the larger corpus has 44 MB, and 25 MB of tokens
