"""Held-out sources as validation in the loop scores them: documents from a source's beginning, in windows, shared out.

A row of a forward pass is one window of a document as an evaluation has them (`pretrain/evaluation/windows.py`), window
and stride being the run's sequence length T: a document is scored alike whoever scores it, and however the training
data is packed. Which rows a rank is given follows from the documents alone, so that all ranks make equally many forward
passes, of equal shapes, without a word.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.batch import IGNORED_TARGET, Batch
from data_pipeline.config import SourceConfig
from data_pipeline.manifest import Manifest
from data_pipeline.remote import shown
from data_pipeline.tokenizer import Tokenizer
from pretrain.config import RunConfig
from pretrain.evaluation.score import Score
from pretrain.evaluation.token_texts import read_token_texts
from pretrain.evaluation.windows import Window, Windowing, document_windows
from pretrain.parallel_dims import ParallelDims

MOST_WIDTHS = 5  # T and its halves: each saves padding of short documents, and is a shape more to be ready for


@dataclass(frozen=True)
class HeldOut:
    """What is scored of a source.

    documents: token ids `(n,)` of each, without BOS and EOS. start_id: what the first token of each is given. eos_id:
    the target that ends each, but for the last one if it is cut. counts: over all of them, without their nats.
    """

    documents: tuple[np.ndarray, ...]
    start_id: int
    eos_id: int
    cut: bool
    counts: Score

    def windows(self, length: int) -> Iterator[Window]:
        """All windows of so many targets."""
        windowing = Windowing(window=length, stride=length, batch_tokens=length)
        whole = len(self.documents) - self.cut
        for number, ids in enumerate(self.documents):
            yield from document_windows(ids, self.start_id, self.eos_id if number < whole else None, windowing)


def read_held_out(source: SourceConfig, most_targets: int) -> HeldOut:
    """A source's documents from its beginning up to so many targets, where the last one is cut.

    Raises:
        ValueError: the source is unusable or damaged, or these documents hold no text.
        OSError: it cannot be read now.
    """
    manifest = Manifest.load(source.path)
    tokenizer = Tokenizer(f"{source.path.rstrip('/')}/{manifest.tokenizer_file}")
    documents: list[np.ndarray] = []
    targets = text_bytes = 0
    for text, ids in read_token_texts(source.path, manifest, tokenizer):
        kept = ids[: most_targets - targets]
        documents.append(kept)
        text_bytes += len((text if len(kept) == len(ids) else tokenizer.decode(kept)).encode())
        targets += len(ids) + 1  # and the EOS
        if targets >= most_targets:
            break
    if not text_bytes:
        raise ValueError(f"{source.name}: the held-out documents of {shown(source.path)} hold no text to be scored by")
    counts = Score(tokens=min(targets, most_targets), bytes=text_bytes, documents=len(documents))
    start_id = manifest.eos_id if manifest.bos_id is None else manifest.bos_id
    return HeldOut(tuple(documents), start_id, manifest.eos_id, targets > most_targets, counts)


def rank_batches(held_out: HeldOut, config: RunConfig, dims: ParallelDims) -> list[Batch]:
    """This data-parallel rank's share of the windows: rows of like length, padded to one of a few widths, and as many
    as hold no more tokens than a micro-batch. Rows that a rank lacks are empty. A compiled model, which is built again
    for each shape, gets that of a micro-batch only."""
    T, rows_at_most = config.data.sequence_length, config.batch.micro_batch_size
    compiled = config.parallel.compile
    widths = [T] if compiled else row_widths(T, config.parallel.ranks_per_sample)
    seen: Counter[int] = Counter()
    own: dict[int, list[Window]] = defaultdict(list)
    for window in held_out.windows(T):
        width = min(width for width in widths if width >= len(window))
        if seen[width] % dims.data_world == dims.data_rank:
            own[width].append(window)
        seen[width] += 1
    batches = []
    for width in sorted(seen, reverse=True):  # too large a batch shows at once
        at_once = rows_at_most * T // width
        most = -(-seen[width] // dims.data_world)  # windows of the rank that has most
        for first in range(0, most, at_once):
            rows = at_once if compiled else min(at_once, most - first)
            batches.append(_batch(own[width][first : first + at_once], rows, width))
    return batches


def row_widths(length: int, multiple: int) -> list[int]:
    """What rows are padded to, longest first: T, its half, and so on, each a multiple of the ranks that split rows."""
    widths = [length]
    while len(widths) < MOST_WIDTHS and widths[-1] % (2 * multiple) == 0:
        widths.append(widths[-1] // 2)
    return widths


def _batch(windows: list[Window], rows: int, width: int) -> Batch:
    """Windows as rows, padded on the right, where causality hides it. A row is one document: it needs no mask."""
    tokens = np.zeros((rows, width), dtype=np.int64)
    targets = np.full((rows, width), IGNORED_TARGET, dtype=np.int64)
    for row, window in enumerate(windows):
        tokens[row, : len(window)] = window.inputs
        targets[row, : len(window)] = window.targets
    return Batch(tokens, targets, None, None)
