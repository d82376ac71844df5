"""What befalls a preparation: workers that are killed, full disks, several machines at once. Real processes."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from data_pipeline.corpus.config import CorpusConfig, corpus_of
from data_pipeline.preparation.job import Request, prepare, prepare_corpus
from data_pipeline.preparation.work_folder import WorkFolder
from data_pipeline.preparation.workers import Progress
from data_pipeline.tokenizer import Tokenizer
from tests.unit.data_pipeline.preparation.folders import files_of, sample_texts, write_corpus

EVERYTHING = {"exact_duplicates": True, "near_duplicates": True, "length": {"min_characters": 150}}
UNIT_BYTES = 20_000
SHARD_BYTES = 8_000


def request_for(corpus: Path, tokenizer_path: Path, out: Path) -> Request:
    config = CorpusConfig.model_validate({"inputs": [{"path": str(corpus)}], "curation": EVERYTHING})
    return Request(config, str(tokenizer_path), out, SHARD_BYTES, UNIT_BYTES, (64,))


@pytest.fixture(scope="module")
def many_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dozen units, in some of which texts of others come back, whole or nearly so."""
    texts = sample_texts(480)
    rng = random.Random(1)
    for place in rng.sample(range(1, 480), 50):
        earlier = texts[rng.randrange(place)]
        texts[place] = earlier if place % 2 else earlier + " and so on"
    return write_corpus(tmp_path_factory.mktemp("many") / "c", texts, 24)


@pytest.fixture(scope="module")
def undisturbed(many_files: Path, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of it that nothing befalls."""
    out = tmp_path_factory.mktemp("undisturbed") / "d"
    manifest = prepare_corpus(request_for(many_files, tokenizer_path, out), 1)
    removed = json.loads((out / "report.json").read_text())["inputs"]["c"]["removed"]
    assert {"exact_duplicates", "near_duplicates", "length.min_characters"} <= removed.keys()
    assert len(manifest.shards) > 30
    return files_of(out)


def machine(corpus: Path, tokenizer_path: Path, out: Path) -> "subprocess.Popen[str]":
    """A process that prepares with two workers of its own, however little there is to do."""
    code = f"""if True:
        from pathlib import Path
        import data_pipeline.preparation.workers as workers
        from tests.unit.data_pipeline.preparation.test_faults import prepare_corpus, request_for
        workers.PROCESS_BYTES = 1
        prepare_corpus(request_for(Path({str(corpus)!r}), Path({str(tokenizer_path)!r}), Path({str(out)!r})), 2)
    """
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def tree(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """A process and its workers."""
    try:
        whole = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        return [one for one in whole if one.pid == process.pid or "spawn_main" in " ".join(one.cmdline())]
    except psutil.NoSuchProcess:
        return []


def tasks_done(out: Path) -> int:
    try:
        return len(WorkFolder(out).tasks_done())
    except FileNotFoundError:
        return 0


@pytest.mark.slow
def test_kills_and_other_machines_change_no_byte(
    many_files: Path, undisturbed: dict[str, bytes], tokenizer_path: Path, tmp_path: Path
) -> None:
    """SIGKILL at a first process or a worker, at several points of the job, while another machine, which came at once
    or later, works, too."""
    out = tmp_path / "d"
    rng = random.Random(7)

    def pair_of(at_least: int, second_at: int) -> list["subprocess.Popen[str]"]:
        """Two machines at a time when so many tasks are done; the second one came when so many were."""
        pair = [machine(many_files, tokenizer_path, out)]
        deadline = time.monotonic() + 60
        while tasks_done(out) < at_least and time.monotonic() < deadline and pair[0].poll() is None:
            if len(pair) == 1 and tasks_done(out) >= second_at:
                pair.append(machine(many_files, tokenizer_path, out))
            time.sleep(0.002)
        return pair

    for at_least, second_at in ((1, 0), (10, 3), (22, 0), (30, 15), (45, 30), (70, 0), (100, 75)):
        pair = pair_of(at_least, second_at)
        for process in pair:
            if victims := tree(process):
                rng.choice(victims).send_signal(signal.SIGKILL)
        for process in pair:
            _, said = process.communicate(timeout=60)
            assert "Traceback" not in said or "OSError: a worker was ended by SIGKILL" in said, said
    for process in pair_of(1000, tasks_done(out) + 5):
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert files_of(out) == undisturbed


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_command_and_the_next_one_goes_on(
    many_files: Path,
    undisturbed: dict[str, bytes],
    tokenizer_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("data_pipeline.preparation.workers.PROCESS_BYTES", 1)
    out = tmp_path / "d"
    request = request_for(many_files, tokenizer_path, out)

    def kill_one() -> None:
        while tasks_done(out) < 3:
            time.sleep(0.005)
        workers = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
        workers[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(OSError, match="a worker was ended by SIGKILL.*run the same command again"):
        prepare_corpus(request, 2)
    killer.join()
    done = tasks_done(out)
    assert done >= 3
    kept = {path.name: path.stat().st_mtime_ns for path in (WorkFolder(out).path / "done").iterdir()}
    monkeypatch.undo()
    seen: list[Progress] = []
    prepare_corpus(request, 1, seen.append)
    assert files_of(out) == undisturbed
    assert len(kept) == done
    assert seen[0].phase == "read"
    assert seen[0].done_bytes > 0, "what was finished was done again"


def test_an_error_of_a_worker_arrives_as_it_was(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.preparation.workers.PROCESS_BYTES", 1)
    folder = write_corpus(tmp_path / "c", sample_texts(40), 4)
    (folder / "part_002.jsonl").unlink()
    (folder / "part_002.jsonl.gz").write_bytes(b"\x1f\x8b\x08\0 torn")
    with pytest.raises(ValueError, match="part_002.jsonl.gz is truncated or damaged"):
        prepare_corpus(Request(corpus_of([folder]), str(tokenizer_path), tmp_path / "d", unit_bytes=1), 2)


def test_a_lack_of_memory_is_told_and_nothing_is_counted_as_done(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.preparation.encoding.CHUNK_CHARACTERS", 10_000)
    encode_batch = Tokenizer.encode_batch

    def fail_late(self: Tokenizer, texts: list[str]) -> list[np.ndarray]:
        if any("quick brown fox" in text for text in texts):
            raise MemoryError("no memory left")
        return encode_batch(self, texts)

    with monkeypatch.context() as patched:
        patched.setattr(Tokenizer, "encode_batch", fail_late)
        with pytest.raises(MemoryError, match="no memory left"):
            prepare([str(corpus)], tokenizer_path, tmp_path / "d", workers=2)
    assert tasks_done(tmp_path / "d") == 0
    prepare([str(corpus)], tokenizer_path, tmp_path / "d")
    prepare([str(corpus)], tokenizer_path, tmp_path / "clean")
    assert files_of(tmp_path / "d") == files_of(tmp_path / "clean")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_is_told_and_the_job_goes_on_when_there_is_room(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.preparation.encoding.CHUNK_CHARACTERS", 1_000)
    corpus, out = write_corpus(tmp_path / "c", sample_texts(60), 20), tmp_path / "d"

    def fill_the_disk(progress: Progress) -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        for descriptor in os.listdir("/proc/self/fd"):
            target = Path("/proc/self/fd", descriptor)
            if target.is_symlink() and os.readlink(target).endswith(".bin.tmp"):
                os.dup2(full, int(descriptor))
        os.close(full)

    with pytest.raises(OSError, match="No space left"):
        prepare([corpus], tokenizer_path, out, workers=1, progress=fill_the_disk)
    prepare([corpus], tokenizer_path, out)
    prepare([corpus], tokenizer_path, tmp_path / "clean")
    assert files_of(out) == files_of(tmp_path / "clean")


@pytest.mark.slow
def test_memory_stays_bounded(tokenizer_path: Path, tmp_path: Path) -> None:
    """Ten times the text must not take ten times the memory."""
    text = json.dumps({"text": "some words of a document that is not long. " * 50}) + "\n"
    corpus = tmp_path / "c.jsonl"
    peaks_kb = []
    for lines in (2_000, 20_000):
        corpus.write_text(text * lines)
        code = f"""if True:
            import re
            from data_pipeline.preparation.job import prepare
            prepare([{str(corpus)!r}], {str(tokenizer_path)!r}, {str(tmp_path / str(lines))!r}, workers=2)
            print(re.search("VmHWM:\\\\s+(\\\\d+)", open("/proc/self/status").read())[1])
        """
        peaks_kb.append(int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout))
    assert peaks_kb[1] < peaks_kb[0] + 25_000, peaks_kb  # the larger corpus has 44 MB, and 25 MB of tokens
