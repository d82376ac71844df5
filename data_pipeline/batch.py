"""One micro-batch, as numpy arrays that `torch.from_numpy` takes without a copy.

Shapes: B sequences of a micro-batch, T tokens of a sequence.
"""

import itertools
from dataclasses import dataclass

import numpy as np

IGNORED_TARGET = -100
"""A target that does not count: padding, or what would follow the end of a document."""


@dataclass(frozen=True)
class Batch:
    """Contiguous, writable, native-endian int64 arrays `(B, T)`."""

    tokens: np.ndarray
    targets: np.ndarray
    """`targets[b, t]` follows `tokens[b, t]`; -100 does not count."""
    positions: np.ndarray | None
    """Places within the document, from 0 at its start (or where the row takes it up). None: no mask."""
    document_ids: np.ndarray | None
    """Number of the document within the row, from 0. None: no document mask."""

    @property
    def valid_tokens(self) -> int:
        """How many targets count."""
        return int(np.count_nonzero(self.targets != IGNORED_TARGET))

    def split(self, rows: int) -> "list[Batch]":
        """Batches of so many rows each, which share this one's memory."""
        return [
            Batch(
                self.tokens[row : row + rows],
                self.targets[row : row + rows],
                None if self.positions is None else self.positions[row : row + rows],
                None if self.document_ids is None else self.document_ids[row : row + rows],
            )
            for row in range(0, len(self.tokens), rows)
        ]


def make_batch(windows: np.ndarray, bos_id: int | None, eos_id: int, document_mask: bool) -> Batch:
    """Turn windows `(B, T + 1)` of token ids into inputs and targets.

    Without a mask every token is followed by the next one, across documents. With a mask, positions and document
    ids restart at each document's start and nothing follows an EOS. A document starts at its BOS or, where the
    tokenizer has none, after an EOS.
    """
    # From the narrow type straight to contiguous int64: one pass over memory each.
    tokens = windows[:, :-1].astype(np.int64)
    targets = windows[:, 1:].astype(np.int64)
    if not document_mask:
        return Batch(tokens, targets, None, None)
    ends = windows[:, :-1] == eos_id
    if bos_id is not None:
        starts = windows[:, :-1] == bos_id
    else:
        starts = np.zeros(tokens.shape, dtype=bool)
        starts[:, 1:] = ends[:, :-1]
    targets[ends] = IGNORED_TARGET
    return Batch(tokens, targets, *_positions_and_documents(starts))


def join_extents(
    tokens: np.ndarray,
    counts: np.ndarray,
    first: np.ndarray,
    sequence_length: int,
    bos_id: int | None,
    eos_id: int,
    document_mask: bool,
    whole_documents: bool,
) -> Batch:
    """Turn samples, each of one extent or several, into a batch: rows are padded by EOS, whose targets do not count.

    The target of an extent's last token is what follows it in the stream, also where the row goes on with something
    else. An EOS is different: what follows it is no matter of its document. Within a row it is followed by what comes
    next there; at the end of the row's content by what comes next in the stream, or by nothing if samples are made of
    whole documents. With a mask, nothing follows an EOS, each extent starts anew, and padding is a document by itself.

    Args:
        tokens: `(sum(counts + 1),)` ids: each extent and the token that follows it in the stream.
        counts: `(m,)` tokens of each extent, without that one.
        first: `(B + 1,)`: row b has the extents `first[b]` to `first[b + 1]`, and at most T tokens; perhaps none.
        sequence_length: T.
        bos_id, eos_id, document_mask: as in `make_batch`.
        whole_documents: whether rows are made of whole documents (which a row cuts only if they are longer).
    """
    B, T = len(first) - 1, sequence_length
    if len(counts) == B and (counts == T).all():
        batch = make_batch(tokens.reshape(B, T + 1), bos_id, eos_id, document_mask)
        if whole_documents:
            batch.targets[batch.tokens[:, -1] == eos_id, -1] = IGNORED_TARGET
        return batch

    is_input = np.ones(len(tokens), dtype=bool)
    is_input[np.cumsum(counts + 1) - 1] = False
    content, following = tokens[is_input], tokens[1:][is_input[:-1]]
    end = np.cumsum(counts)
    row_ends = np.concatenate([[0], end])[first]
    inputs = _in_rows(content, row_ends, T, eos_id)
    targets = _in_rows(following, row_ends, T, IGNORED_TARGET)
    at_eos = content == eos_id
    if document_mask:
        targets[inputs == eos_id] = IGNORED_TARGET
    else:
        row = np.repeat(np.arange(B), np.diff(first))
        last = row * T + end - 1 - row_ends[row]  # place of each extent's last token in the rows
        ends_row = np.zeros(len(counts), dtype=bool)
        ends_row[first[1:][np.diff(first) > 0] - 1] = True
        closed = at_eos[end - 1]
        joined = closed & ~ends_row
        targets.flat[last[joined]] = content[end[joined]]
        if whole_documents:
            targets.flat[last[closed & ends_row]] = IGNORED_TARGET

    if not document_mask:
        return Batch(inputs, targets, None, None)
    begins = np.concatenate([[False], at_eos])[:-1] if bos_id is None else content == bos_id
    begins[end - counts] = True
    starts = _in_rows(begins, row_ends, T, False)
    row_tokens = np.diff(row_ends)
    short = np.flatnonzero(row_tokens < T)
    starts[short, row_tokens[short]] = True
    return Batch(inputs, targets, *_positions_and_documents(starts))


def _in_rows(content: np.ndarray, row_ends: np.ndarray, T: int, padding: int) -> np.ndarray:
    """Content `(n,)` in rows `(B, T)`, int64 or bool, whose rest is padded. `row_ends`: `(B + 1,)`, from 0 to n."""
    rows = np.empty((len(row_ends) - 1, T), dtype=bool if content.dtype == bool else np.int64)
    for row, (begin, end) in zip(rows, itertools.pairwise(row_ends.tolist()), strict=True):
        row[: end - begin] = content[begin:end]
        row[end - begin :] = padding
    return rows


def _positions_and_documents(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions within the document and numbers of the document, int64 `(B, T)` each.

    `starts`: where a document starts, bool `(B, T)`. It is used up.
    """
    B, T = starts.shape
    document_ids = starts.view(np.int8)
    document_ids[:, 0] = 0  # the row's first document is number 0, whether or not it starts here
    document_ids = np.cumsum(document_ids, axis=1, dtype=np.int64)
    # Positions are the running sum of steps of one, and of a step back where a document starts. Running sums take a
    # fifth of the time of np.repeat.
    starts[:, 0] = True
    first = np.flatnonzero(starts)
    steps = np.ones(B * T, dtype=np.int64)
    steps[first[1:]] -= np.diff(first)
    steps[0] = 0
    return np.cumsum(steps).reshape(B, T), document_ids
