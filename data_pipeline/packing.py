"""Best-fit packing: whole documents into samples of T tokens, so that none that fits is cut.

Best-fit decreasing (Ding et al. 2024, "Fewer truncations improve language modeling", arXiv 2404.10830, section 3):
documents of more than T tokens are cut into pieces of T and a rest; then, longest first, each piece goes where the
least room is left that still takes it. At most 11/9 of the fewest possible bins, and a few, are opened (Johnson et al.
1974, "Worst-case performance bounds for simple one-dimensional packing algorithms"). Where short documents abound, all
but the last bins come out full; where most are a little longer than half of T, nothing goes with them. All of it is
integers, in a stated order, so that it is the same everywhere.
"""

from collections import defaultdict

import numpy as np

from data_pipeline.samples import Extents, cut_long


def pack_documents(start: np.ndarray, count: np.ndarray, sequence_length: int) -> Extents:
    """Pack documents into samples of at most `sequence_length` tokens.

    Args:
        start: first token of each document, int64 `(n,)`, ascending.
        count: its tokens, int64 `(n,)`, positive.
        sequence_length: T.

    Returns:
        The samples, in the order of their first extents; the extents of each in file order, so that a document's
        length does not decide its place in a row.
    """
    start, count = cut_long(start, count, sequence_length)
    bins = best_fit(count, sequence_length)
    # Pieces come in file order, so a bin's first one stands where its number appears first.
    _, first_piece, bin_of_piece = np.unique(bins, return_index=True, return_inverse=True)
    by_sample = np.argsort(first_piece[bin_of_piece], kind="stable")
    sizes = np.bincount(bins)[bins[np.sort(first_piece)]]
    return Extents(np.concatenate([[0], np.cumsum(sizes)]), start[by_sample], count[by_sample])


def best_fit(count: np.ndarray, room: int) -> np.ndarray:
    """The bin of each piece, int64 `(n,)`, when pieces of `count` tokens `(n,)` go into bins of `room` tokens."""
    bins = np.empty(len(count), dtype=np.int64)
    full = np.flatnonzero(count == room)
    bins[full] = np.arange(len(full))
    opened = len(full)
    # The bins by the room they have left, and which rooms there are, as bits: the least one that takes a piece is one
    # shift and one count away, in place of a search tree.
    by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = 0
    order = np.argsort(-count, kind="stable")[len(full) :]
    for piece, needed in zip(order.tolist(), count[order].tolist(), strict=True):
        fitting = rooms >> needed
        if fitting:
            left = (fitting & -fitting).bit_length() - 1
            stack = by_room[needed + left]
            chosen = stack.pop()
            if not stack:
                rooms ^= 1 << (needed + left)
        else:
            left, chosen = room - needed, opened
            opened += 1
        bins[piece] = chosen
        if left:
            by_room[left].append(chosen)
            rooms |= 1 << left
    return bins
