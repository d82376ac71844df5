"""Documents become tokens: in order, in threads, with a bounded number of them in flight."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from data_pipeline.origins import MAX_TEXT_BYTES, ORIGIN_DTYPE
from data_pipeline.shards import token_dtype
from data_pipeline.tokenizer import Tokenizer

CHUNK_CHARACTERS = 1 << 19
"""Text of one task: long enough that handing it over costs nothing, short enough that all cores end together."""


@dataclass(frozen=True, slots=True)
class ChosenText:
    """A document that goes into the data folder."""

    text: str
    file: int
    """The number of its file in the corpus."""
    index: int
    """Its number in the file."""


@dataclass(frozen=True)
class EncodedChunk:
    """Documents `BOS t1 .. tn EOS`, one after another; no BOS if the tokenizer has none."""

    tokens: np.ndarray
    lengths: np.ndarray
    origins: np.ndarray


class Encoder:
    """Encodes a stream of documents.

    In threads: sentencepiece encodes a batch without the interpreter's lock and hands over arrays, so threads were
    measured as fast as its own pool; and unlike a worker process, a thread cannot die and take documents with it.
    """

    def __init__(self, tokenizer: Tokenizer, threads: int) -> None:
        assert tokenizer.eos_id is not None
        self._tokenizer = tokenizer
        self._threads = threads
        self._dtype = token_dtype(tokenizer.vocab_size)

    def encode(self, documents: Iterable[ChosenText]) -> Iterator[EncodedChunk]:
        """The tokens of the documents, in their order."""
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="tokenize")
        pending: deque[Future[EncodedChunk]] = deque()
        try:
            for chunk in _chunks(documents):
                pending.append(pool.submit(self._encode_chunk, chunk))
                if len(pending) > 2 * self._threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _encode_chunk(self, documents: list[ChosenText]) -> EncodedChunk:
        ids = self._tokenizer.encode_batch([document.text for document in documents])
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
        origins = np.array(
            [(document.index, document.file, utf8_bytes(document.text)) for document in documents], dtype=ORIGIN_DTYPE
        )
        return EncodedChunk(tokens, lengths, origins)


def _chunks(documents: Iterable[ChosenText]) -> Iterator[list[ChosenText]]:
    chunk: list[ChosenText] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def utf8_bytes(text: str) -> int:
    """The length of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def require_storable(text_bytes: int, path: str, index: int) -> None:
    """Raise ValueError for a document that is too long for the shards' format."""
    if text_bytes > MAX_TEXT_BYTES:
        raise ValueError(
            f"document {index} of {path} has {text_bytes:,} bytes, but the shards hold documents of at most "
            f"{MAX_TEXT_BYTES:,}: split it, or set curation.length.max_characters"
        )
