"""The documents of a data folder: all of them in turn, or those that a run of tokens is made of and their origins."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from data_pipeline.origins import ORIGIN_DTYPE, ORIGINS_NAME, OriginFile, parse_origin_files
from data_pipeline.shards import parse_index
from data_pipeline.token_source import TokenSource

READ_TOKENS = 1 << 20
"""Of documents in turn, read at once."""
AHEAD_TOKENS = 8 * READ_TOKENS
"""Fetched ahead of them, from elsewhere."""


@dataclass(frozen=True)
class DocumentPart:
    """A run of tokens of one document."""

    document: int
    """Number of the document in the data folder, from 0."""
    start: int
    """The part's first token within the document, whose BOS is token 0."""
    tokens: np.ndarray
    """`(n,)`, in the manifest's dtype."""
    document_tokens: int
    """Of the whole document, with BOS and EOS."""
    file: str | None
    """Where the document was read from; None if the data folder does not say."""
    index: int | None
    """Its number in that file, from 0."""


class Documents:
    """Looks documents up by their tokens' places in the stream. Reads the indices of the shards that are asked for."""

    def __init__(self, source: TokenSource) -> None:
        self._source = source
        self._shards = source.manifest.shards
        self._first_token = np.cumsum([0] + [shard.tokens for shard in self._shards])
        self._first_document = np.cumsum([0] + [shard.documents for shard in self._shards])
        self._starts = lru_cache(maxsize=4)(self._read_starts)
        self._origins = lru_cache(maxsize=4)(self._read_origins)

    def parts(self, start: int, count: int) -> Iterator[DocumentPart]:
        """The documents in `count` tokens of the stream from `start` on.

        Raises:
            ValueError: what is read of the folder is damaged.
            OSError: it cannot be had now.
        """
        tokens = self._source.read_tokens(start, count)
        while len(tokens):
            shard = int(np.searchsorted(self._first_token, start, side="right")) - 1
            starts = self._starts(shard)
            in_shard = start - int(self._first_token[shard])
            number = int(np.searchsorted(starts, in_shard, side="right")) - 1
            begin, end = int(starts[number]), int(starts[number + 1])
            here = min(len(tokens), end - in_shard)
            file, index = self._origin(shard, number)
            document = int(self._first_document[shard]) + number
            yield DocumentPart(document, in_shard - begin, tokens[:here], end - begin, file, index)
            start, tokens = start + here, tokens[here:]

    def in_order(self) -> Iterator[np.ndarray]:
        """All documents in turn, each as its tokens `(n,)` in the manifest's dtype, with BOS and EOS.

        Memory holds `READ_TOKENS`, or a document that is longer, of which these are views.

        Raises:
            ValueError: what is read of the folder is damaged.
            OSError: it cannot be had now.
        """
        for shard, first_token in enumerate(self._first_token[:-1].tolist()):
            starts = self._starts(shard)
            number, documents = 0, len(starts) - 1
            while number < documents:
                end = int(np.searchsorted(starts, starts[number] + READ_TOKENS, side="right")) - 1
                end = max(end, number + 1)
                begin_token, tokens = first_token + int(starts[number]), int(starts[end] - starts[number])
                ahead = min(AHEAD_TOKENS, self._source.tokens - begin_token)
                if ahead:
                    self._source.prefetch(np.array([begin_token]), np.array([ahead]))
                run = self._source.read_tokens(begin_token, tokens)
                yield from np.split(run, starts[number + 1 : end] - starts[number])
                number = end

    def _read_starts(self, shard: int) -> np.ndarray:
        """First token of each document of a shard, within it, and at last the shard's tokens: int64 `(n + 1,)`."""
        info = self._shards[shard]
        name = f"{info.name}.idx"
        lengths, _ = parse_index(self._source.read_file(name, info.idx_xxh3), name)
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def _origin(self, shard: int, number: int) -> tuple[str | None, int | None]:
        if self._shards[shard].origin_xxh3 is None:
            return None, None
        origin = self._origins(shard)[number]
        return self._files[int(origin["file"])].path, int(origin["index"])

    @cached_property
    def _files(self) -> list[OriginFile]:
        expected = self._source.manifest.origins_xxh3
        assert expected is not None
        return parse_origin_files(self._source.read_file(ORIGINS_NAME, expected), ORIGINS_NAME)

    def _read_origins(self, shard: int) -> np.ndarray:
        info = self._shards[shard]
        assert info.origin_xxh3 is not None
        return np.frombuffer(self._source.read_file(f"{info.name}.origin", info.origin_xxh3), dtype=ORIGIN_DTYPE)
