"""A corpus becomes a data folder: read, tokenize on all cores, write; all of it streamed."""

import base64
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline.corpus import Document, Rejected, corpus_bytes, read_documents
from data_pipeline.manifest import MANIFEST_NAME, QUARANTINE_NAME, TOKENIZER_NAME, Manifest
from data_pipeline.shards import DEFAULT_SHARD_BYTES, ShardWriter, token_dtype, write_atomically
from data_pipeline.tokenizer import Tokenizer

UNFINISHED_NAME = "prepare.unfinished"
"""Stands in a folder while it is written, so that only a folder of our own making is ever replaced."""
CHUNK_CHARACTERS = 1 << 19
"""Text of one task: long enough that handing it over costs nothing, short enough that all cores end together."""


@dataclass(frozen=True)
class Progress:
    """How far a preparation is."""

    read_bytes: int
    """Of the input files, as they are stored."""
    total_bytes: int | None
    """None where a hub dataset does not say."""
    text_bytes: int
    documents: int
    tokens: int


def prepare(
    inputs: Sequence[str],
    tokenizer_path: str | Path,
    out: str | Path,
    text_field: str = "text",
    workers: int | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Manifest:
    """Tokenize a corpus into the folder `out`, each document as `BOS t1 .. tn EOS`; no BOS if the tokenizer has none.

    The files are the same for every number of workers. What an earlier attempt left unfinished in `out` is replaced.

    Raises:
        ValueError: an input does not exist, is damaged or holds no document; the tokenizer has no EOS; or `out` is a
            finished data folder or holds something else.
        OSError: the disk is full, or the like. What was written is removed.
    """
    out = Path(out)
    tokenizer = Tokenizer(tokenizer_path)
    if tokenizer.eos_id is None:
        raise ValueError(
            f"tokenizer {tokenizer_path} has no EOS piece, but every document ends with one: train another"
        )
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}, but at least 1 is needed")
    total_bytes = corpus_bytes(inputs)
    _claim(out)
    try:
        manifest = _Preparation(tokenizer, out, total_bytes, progress).run(inputs, text_field, workers, shard_bytes)
    except BaseException:
        _clear(out)
        raise
    (out / UNFINISHED_NAME).unlink()
    return manifest


def _claim(out: Path) -> None:
    if (out / MANIFEST_NAME).exists():
        raise ValueError(f"data folder {out} exists and is finished: choose another --out or remove it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a folder: choose another --out")
    if (out / UNFINISHED_NAME).exists():
        _clear(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"folder {out} exists and holds other files: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / UNFINISHED_NAME).touch()


def _clear(out: Path) -> None:
    """Remove what a preparation writes, and nothing else. The mark goes last: until then, this can be repeated."""
    ours = ["shard_*", f"{TOKENIZER_NAME}*", f"{QUARANTINE_NAME}*", f"{MANIFEST_NAME}*", UNFINISHED_NAME]
    for pattern in ours:
        for path in out.glob(pattern):
            path.unlink()


class _Preparation:
    def __init__(
        self, tokenizer: Tokenizer, out: Path, total_bytes: int | None, progress: Callable[[Progress], None]
    ) -> None:
        self._tokenizer = tokenizer
        self._out = out
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._quarantine = _Quarantine(out / QUARANTINE_NAME)
        self._total_bytes = total_bytes
        self._progress = progress
        self._read_bytes = 0
        self._documents_read = 0

    def run(self, inputs: Sequence[str], text_field: str, workers: int | None, shard_bytes: int) -> Manifest:
        documents = read_documents(inputs, text_field, self._quarantine.add, self._count_bytes)
        text_bytes = documents_written = tokens_written = 0
        with self._quarantine, ShardWriter(self._out, self._dtype, shard_bytes) as writer:
            for chunk in self._encoded(self._chunks(documents), workers or len(os.sched_getaffinity(0))):
                writer.append(chunk.tokens, chunk.lengths)
                text_bytes += chunk.text_bytes
                documents_written += len(chunk.lengths)
                tokens_written += len(chunk.tokens)
                self._progress(
                    Progress(self._read_bytes, self._total_bytes, text_bytes, documents_written, tokens_written)
                )
        assert documents_written == self._documents_read == sum(shard.documents for shard in writer.shards)
        assert tokens_written == sum(shard.tokens for shard in writer.shards)
        write_atomically(self._out / TOKENIZER_NAME, self._tokenizer.path.read_bytes())
        assert self._tokenizer.eos_id is not None
        manifest = Manifest(
            vocab_size=self._tokenizer.vocab_size,
            bos_id=self._tokenizer.bos_id,
            eos_id=self._tokenizer.eos_id,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            dtype=self._dtype.name,
            documents=documents_written,
            tokens=tokens_written,
            text_bytes=text_bytes,
            quarantined=self._quarantine.records,
            skipped_files=self._quarantine.skipped_files,
            shards=tuple(writer.shards),
        )
        manifest.save(self._out)
        return manifest

    def _count_bytes(self, count: int) -> None:
        self._read_bytes += count

    def _chunks(self, documents: Iterable[Document]) -> Iterator[list[str]]:
        chunk: list[str] = []
        characters = 0
        for document in documents:
            self._documents_read += 1
            chunk.append(document.text)
            characters += len(document.text)
            if characters >= CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
        if chunk:
            yield chunk

    def _encoded(self, chunks: Iterator[list[str]], workers: int) -> "Iterator[_EncodedChunk]":
        """Encode in order, with a bounded number of chunks in flight.

        In threads: sentencepiece encodes a batch without the interpreter's lock and hands over arrays, so threads were
        measured as fast as its own pool; and unlike a worker process, a thread cannot die and take documents with it.
        """
        pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenize")
        pending: deque[Future[_EncodedChunk]] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(self._encode, chunk))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _encode(self, texts: list[str]) -> "_EncodedChunk":
        ids = self._tokenizer.encode_batch(texts)
        bos_id, eos_id = self._tokenizer.bos_id, self._tokenizer.eos_id
        extra = 1 if bos_id is None else 2
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids)) + extra
        ends = np.cumsum(lengths)
        tokens = np.empty(ends[-1], dtype=self._dtype)
        is_text = np.ones(len(tokens), dtype=bool)
        is_text[ends - 1] = False
        tokens[ends - 1] = eos_id
        if bos_id is not None:
            is_text[ends - lengths] = False
            tokens[ends - lengths] = bos_id
        tokens[is_text] = np.concatenate(ids)
        return _EncodedChunk(tokens, lengths, sum(map(_utf8_bytes, texts)))


@dataclass(frozen=True)
class _EncodedChunk:
    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: int


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


class _Quarantine:
    """Keeps broken records, one JSON object a line: path, line, reason, raw (base64). No record, no file."""

    def __init__(self, path: Path) -> None:
        self.records = 0
        self.skipped_files = 0
        self._path = path
        self._file: BinaryIO | None = None

    def __enter__(self) -> "_Quarantine":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def add(self, rejected: Rejected) -> None:
        if rejected.raw is None:
            self.skipped_files += 1
            return
        self.records += 1
        if self._file is None:
            self._file = open(self._path, "wb")  # noqa: SIM115
        raw = base64.b64encode(rejected.raw).decode()
        record = {"path": rejected.path, "line": rejected.line, "reason": rejected.reason, "raw": raw}
        self._file.write((json.dumps(record) + "\n").encode())
