"""One contender of `steppe bench data --part prepare`: `python -P -m launch.bench.data_prepare_contender KIND JOB`.

It answers {"kind": .., "workers": n, "files": k} with how long so many of the files took, and what came of them.
"""

import gzip
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from launch.bench.turns import Answers

BATCH_CHARACTERS = 1 << 19
"""Text of a task of the raw encoder."""


class Made(NamedTuple):
    """What came of a text. added_to_each: tokens that a document has besides those of its text."""

    documents: int
    tokens: int
    added_to_each: int


Act = Callable[[], Made]
Begin = Callable[[dict[str, Any], list[Path], int], Act]  # of a job, some of its files and a number of workers


def sentencepiece(job: dict[str, Any], files: list[Path], workers: int) -> Act:
    """Raw encoding."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=job["tokenizer"])
    batches: list[list[str]] = [[]]
    characters = 0
    for path in files:
        for line in gzip.decompress(path.read_bytes()).splitlines():
            batches[-1].append(json.loads(line)["text"])
            characters += len(batches[-1][-1])
            if characters >= BATCH_CHARACTERS:
                batches.append([])
                characters = 0

    def encode() -> Made:
        with ThreadPoolExecutor(workers) as pool:
            tokens = list(
                pool.map(lambda batch: sum(map(len, processor.encode(batch, out_type="numpy", num_threads=1))), batches)
            )
        return Made(sum(map(len, batches)), sum(tokens), 0)

    return encode


def steppe(job: dict[str, Any], files: list[Path], workers: int, curation: dict[str, Any] | None = None) -> Act:
    """The product, as the command runs it."""
    from data_pipeline.corpus.config import CorpusConfig
    from data_pipeline.preparation.finish_phases import NothingLeftError
    from data_pipeline.preparation.job import Request, prepare_corpus

    inputs = [{"path": str(path)} for path in files]
    corpus = CorpusConfig.model_validate({"inputs": inputs, "curation": curation or {}})
    request = Request(corpus, job["tokenizer"], _fresh(job) / "data", unit_bytes=job["unit_bytes"])

    def prepare() -> Made:
        try:
            manifest = prepare_corpus(request, workers)
        except NothingLeftError:  # rules for prose, on a text that is none
            return Made(0, 0, 0)
        return Made(manifest.documents, manifest.tokens, 1 if manifest.bos_id is None else 2)

    return prepare


def datatrove(job: dict[str, Any], files: list[Path], workers: int) -> Act:
    """Its own reader and tokenizer."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is a process, and uses one core
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    from pretrain.hf_tokenizer import write_fast_tokenizer

    fresh = _fresh(job)
    exported, out, logs = (fresh / name for name in ("tokenizer", "out", "logs"))
    exported.mkdir()
    write_fast_tokenizer(Path(job["tokenizer"]), exported, context_length=2048)
    paths = fresh / "paths.txt"
    paths.write_text("".join(f"{path.name}\n" for path in files), encoding="utf-8")
    eos_token = json.loads((exported / "tokenizer_config.json").read_bytes())["eos_token"]
    executor = LocalPipelineExecutor(
        [
            JsonlReader(str(files[0].parent), paths_file=str(paths)),
            DocumentTokenizer(str(out), str(exported / "tokenizer.json"), eos_token=eos_token, shuffle_documents=False),
        ],
        tasks=workers,
        workers=workers,
        logging_dir=str(logs),
        start_method="fork",  # the quickest, and its processes' time is known to this one
    )

    def tokenize() -> Made:
        executor.run()
        documents = sum(path.stat().st_size for path in out.glob("*.index")) // 8
        counts = [int(path.read_text().splitlines()[1]) for path in out.glob("*.metadata")]
        return Made(documents, sum(counts), 1)

    return tokenize


def _fresh(job: dict[str, Any]) -> Path:
    """An empty folder to write to; what was written before is removed."""
    folder = Path(job["scratch"]) / f"made-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    """Answer until stdin ends."""
    answers = Answers()
    job = json.loads(sys.argv[2])
    begin: dict[str, Begin] = {
        "sentencepiece": sentencepiece,
        "steppe": steppe,
        "steppe-curated": lambda job, files, workers: steppe(job, files, workers, job["curation"]),
        "datatrove": datatrove,
    }
    answers.say(kind=sys.argv[1])
    for question in answers.questions():
        act = begin[question["kind"]](
            job, [Path(path) for path in job["files"][: question["files"]]], question["workers"]
        )
        os.sync()  # what others have left to write is not to be written now
        cpu_seconds, began = _cpu_seconds(), time.perf_counter()
        made = act()
        seconds = time.perf_counter() - began
        answers.say(seconds=seconds, cpu_seconds=_cpu_seconds() - cpu_seconds, **made._asdict())


if __name__ == "__main__":
    main()
