"""One micro-batch, as numpy arrays that `torch.from_numpy` takes without a copy.

Shapes: B sequences of a micro-batch, T tokens of a sequence.
"""

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
    """Places within the document, from 0 at its start (or at the window's, if that comes later). None: no mask."""
    document_ids: np.ndarray | None
    """Number of the document within the window, from 0. None: no document mask."""

    @property
    def valid_tokens(self) -> int:
        """How many targets count."""
        return int(np.count_nonzero(self.targets != IGNORED_TARGET))


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
    B, T = tokens.shape
    ends = windows[:, :-1] == eos_id
    if bos_id is not None:
        starts = windows[:, :-1] == bos_id
    else:
        starts = np.zeros((B, T), dtype=bool)
        starts[:, 1:] = ends[:, :-1]
    targets[ends] = IGNORED_TARGET
    document_ids = starts.view(np.int8)
    document_ids[:, 0] = 0  # the window's first document is number 0, whether or not it starts here
    document_ids = np.cumsum(document_ids, axis=1, dtype=np.int64)
    # Positions are the running sum of steps of one, and of a step back where a document starts. Running sums take a
    # fifth of the time of np.repeat.
    starts[:, 0] = True
    first = np.flatnonzero(starts)
    steps = np.ones(B * T, dtype=np.int64)
    steps[first[1:]] -= np.diff(first)
    steps[0] = 0
    positions = np.cumsum(steps)
    return Batch(tokens, targets, positions.reshape(B, T), document_ids)
