"""How a document is read: windows of its tokens, and batches of windows of like length. Pure.

A document's targets are its tokens t1 .. tn and the EOS that ends it; its inputs are the start token and t1 .. tn. A
document that is longer than the window W is read through windows that begin every S targets (the stride): each counts
only the targets that no earlier window has scored, so S < W gives every later token at least W - S tokens of context.
Without a window a document is read at once, and every token sees all that is before it.
Shapes: B windows of a batch, T the longest of them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import IGNORED_TARGET

POOLED_BATCHES = 16  # windows of about so many batches are sorted by length together: more pads less, and holds more
DEFAULT_BATCH_TOKENS = 8192
MOST_PADDING = 0.1  # of a batch
LEAST_FILLED = 1 / 8  # of `batch_tokens`: below that a device idles, and some padding costs less
WHOLE_DOCUMENT: Literal["document"] = "document"


@dataclass(frozen=True)
class Windowing:
    """How documents are cut, in targets, and how many tokens of them (padding included) go through the model at once.

    window, stride: None to read each document at once; one that is longer than `batch_tokens` is a batch of its own.

    Raises ValueError unless 1 <= stride <= window <= batch_tokens.
    """

    window: int | None
    stride: int | None
    batch_tokens: int

    @classmethod
    def of(
        cls,
        context_length: int,
        window: int | Literal["document"] | None = None,
        stride: int | None = None,
        batch_tokens: int | None = None,
    ) -> "Windowing":
        """Fill in what is not given: the model's training length, windows side by side, a few windows a batch."""
        if window == WHOLE_DOCUMENT:
            return cls(None, stride, DEFAULT_BATCH_TOKENS if batch_tokens is None else batch_tokens)
        window = context_length if window is None else window
        stride = window if stride is None else stride
        return cls(window, stride, max(window, DEFAULT_BATCH_TOKENS) if batch_tokens is None else batch_tokens)

    def __post_init__(self) -> None:
        if self.window is None:
            if self.stride is not None:
                raise ValueError(f"stride={self.stride}: a document that is read at once has none, leave it out")
            if self.batch_tokens < 1:
                raise ValueError(f"batch_tokens={self.batch_tokens}: a batch holds at least one token")
            return
        if self.window < 1:
            raise ValueError(f"window={self.window}: a window holds at least one token")
        if self.stride is None or not 1 <= self.stride <= self.window:
            raise ValueError(
                f"stride={self.stride} must lie between 1 and window={self.window}: a longer one would skip tokens"
            )
        if self.batch_tokens < self.window:
            raise ValueError(
                f"batch_tokens={self.batch_tokens} does not hold one window={self.window}: raise it, or lower window"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """One row of a forward pass: inputs and targets `(T,)` int64; a target scored by an earlier window is -100.

    begin: the place of its first target in its document. document: whose it is.
    """

    inputs: np.ndarray
    targets: np.ndarray
    begin: int = 0
    document: int = 0

    def __len__(self) -> int:
        return len(self.inputs)


def document_windows(
    ids: np.ndarray, start: int, eos: int | None, windowing: Windowing, document: int = 0
) -> Iterator[Window]:
    """The windows of one document of token ids `(n,)`, at least one; over all of them each target counts once."""
    sequence = np.concatenate([[start], ids, [] if eos is None else [eos]]).astype(np.int64)
    inputs, targets = sequence[:-1], sequence[1:]
    begin = scored = 0
    while True:
        end = len(targets) if windowing.window is None else min(begin + windowing.window, len(targets))
        counted = targets[begin:end]
        if scored > begin:
            counted = counted.copy()
            counted[: scored - begin] = IGNORED_TARGET
        yield Window(inputs[begin:end], counted, begin, document)
        if end == len(targets):
            return
        assert windowing.stride is not None
        begin, scored = begin + windowing.stride, end


def packed(windows: Iterable[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Batches of windows of similar length whose number times the longest is at most `batch_tokens`; a window that is
    longer itself is alone."""
    pool: list[Window] = []
    pooled_tokens = 0
    for window in windows:
        pool.append(window)
        pooled_tokens += max(1, len(window))
        if pooled_tokens >= POOLED_BATCHES * batch_tokens:
            yield from _cut(pool, batch_tokens)
            pool, pooled_tokens = [], 0
    yield from _cut(pool, batch_tokens)


def _cut(pool: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Longest first: the first row of a batch is its longest, and too large a batch shows at once, not hours later.

    A batch that is large enough to be worth it ends early where the next window would make too much of it padding.
    """
    batch: list[Window] = []
    held_tokens = 0
    for window in sorted(pool, key=len, reverse=True):
        if batch:
            padded_tokens = (len(batch) + 1) * max(1, len(batch[0]))
            wasted = padded_tokens - held_tokens - len(window) > MOST_PADDING * padded_tokens
            if padded_tokens > batch_tokens or (wasted and padded_tokens > LEAST_FILLED * batch_tokens):
                yield batch
                batch, held_tokens = [], 0
        batch.append(window)
        held_tokens += len(window)
    if batch:
        yield batch


def padded(batch: list[Window]) -> tuple[Tensor, Tensor]:
    """Inputs and targets `(B, T)`, padded on the right with token 0 and target -100; causality hides the padding."""
    width = max(1, *(len(row) for row in batch))  # 1: an empty document without EOS has no target, yet is counted
    inputs_BT = torch.zeros(len(batch), width, dtype=torch.int64)
    targets_BT = torch.full((len(batch), width), IGNORED_TARGET, dtype=torch.int64)
    for at, row in enumerate(batch):
        inputs_BT[at, : len(row)] = torch.from_numpy(row.inputs)
        targets_BT[at, : len(row)] = torch.from_numpy(row.targets)
    return inputs_BT, targets_BT
