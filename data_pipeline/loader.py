"""Batches for one rank: shards -> order -> loader -> train.

A background thread prepares the next global batch. Worker processes would cost more than they bring: tokens are only
copied here, at several times the speed of the fastest training step.
"""

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from data_pipeline.batch import IGNORED_TARGET, Batch, make_batch
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.manifest import Manifest
from data_pipeline.order import SampleOrder, Stage
from data_pipeline.token_source import TokenSource, open_sources

PREFETCHED = 2
"""Global batches that wait ready."""
SAMPLES_AHEAD = 2048
"""Positions whose order is worked out at once: numpy's cost a call is spread over them."""
PLANS_AHEAD = 256
"""Global batches that may be asked of the plan ahead of need."""


class Loader(Iterator[list[Batch]]):
    """This rank's micro-batches of each global batch, in the run's sample order.

    The global batches are the same for every `data_world` and `micro_batch_size`; rank r has the r-th of `data_world`
    equal runs of positions of each.
    """

    def __init__(
        self,
        data: DataConfig,
        seed: int,
        stages: list[Stage],
        data_rank: int,
        data_world: int,
        micro_batch_size: int,
        document_mask: bool,
        plan: Iterator[tuple[int, int]],
        manifests: Mapping[str, Manifest] = MappingProxyType({}),
    ) -> None:
        """Open the sources and start to read.

        Args:
            data: the sources and how they are cut and shuffled; the weights that count are those of `stages`.
            seed: of the run.
            stages: mixtures by ascending start, see `SampleOrder`.
            data_rank: this rank among those that read different data.
            data_world: how many of them there are.
            micro_batch_size: samples of each Batch.
            document_mask: whether batches keep documents apart, see `make_batch`.
            plan: first position and number of samples of each successive global batch; read ahead of need.
            manifests: of sources, by path, that have been loaded already.

        Raises:
            ValueError: a source is unusable, tokenizers differ, or the stages do not suit the sources.
        """
        assert 0 <= data_rank < data_world
        assert micro_batch_size > 0
        self._sources = open_sources(data.sources, data.sequence_length, manifests)
        manifest = next(iter(self._sources.values())).manifest
        self._dtype = manifest.numpy_dtype
        self._bos_id, self._eos_id = manifest.bos_id, manifest.eos_id
        self._order = SampleOrder(
            windows={name: source.windows for name, source in self._sources.items()},
            block_windows=max(1, data.shuffle_block_bytes // (data.sequence_length * self._dtype.itemsize)),
            group_blocks=data.shuffle_group_blocks,
            seed=seed,
            stages=stages,
        )
        self._T = data.sequence_length
        self._data_rank = data_rank
        self._data_world = data_world
        self._micro_batch_size = micro_batch_size
        self._document_mask = document_mask
        self._plan = plan
        self._ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=PREFETCHED)
        self._next: list[Batch] | BaseException | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._prefetch, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list[Batch]:
        """The next global batch's share.

        Raises:
            StopIteration: the plan is at its end.
            ValueError: data is damaged. Whatever else stopped the reading is raised as well.
        """
        item = self._peek()
        if isinstance(item, BaseException):
            raise item
        self._next = None
        return item

    @property
    def failure(self) -> BaseException | None:
        """What went wrong with the next batch, if anything: waits until that is known, and raises nothing.

        All ranks can so agree to stop before one of them leaves the others waiting.
        """
        item = self._peek()
        return item if isinstance(item, BaseException) and not isinstance(item, StopIteration) else None

    def close(self) -> None:
        """Stop reading and close the files. Not needed at the end of the plan, and harmless there."""
        self._closing.set()
        self._thread.join()
        for source in self._sources.values():
            source.close()

    def _peek(self) -> list[Batch] | BaseException:
        assert not self._closing.is_set(), "the loader was closed"
        if self._next is None:
            self._next = self._ready.get()
        return self._next

    def _prefetch(self) -> None:
        try:
            for positions in self._positions():
                for share in positions:
                    if not self._put(self._micro_batches(*share)):
                        return
            self._put(StopIteration())
        except BaseException as error:  # handed over and raised in the thread that asks
            self._put(error)

    def _put(self, item: list[Batch] | BaseException) -> bool:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def _positions(self) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        """Sources and windows of this rank's samples, for a stretch of global batches at a time."""
        while True:
            shares: list[np.ndarray] = []
            while len(shares) < PLANS_AHEAD and sum(map(len, shares)) < SAMPLES_AHEAD:
                planned = next(self._plan, None)
                if planned is None:
                    break
                shares.append(self._share(*planned))
            if not shares:
                return
            source, _, window = self._order.samples(np.concatenate(shares))
            cuts = np.cumsum([len(share) for share in shares])[:-1]
            yield list(zip(np.split(source, cuts), np.split(window, cuts), strict=True))

    def _share(self, first: int, count: int) -> np.ndarray:
        share = count // self._data_world
        assert share * self._data_world == count
        assert share % self._micro_batch_size == 0
        return first + self._data_rank * share + np.arange(share)

    def _micro_batches(self, source: np.ndarray, window: np.ndarray) -> list[Batch]:
        tokens = np.empty((len(window), self._T + 1), dtype=self._dtype)
        for number in np.unique(source):
            chosen = np.flatnonzero(source == number)
            rows = np.empty((len(chosen), self._T + 1), dtype=self._dtype)
            self._sources[self._order.sources[number]].read(window[chosen], rows)
            tokens[chosen] = rows
        return [
            make_batch(tokens[start : start + self._micro_batch_size], self._bos_id, self._eos_id, self._document_mask)
            for start in range(0, len(tokens), self._micro_batch_size)
        ]


def validation_batches(
    source: SourceConfig,
    sequence_length: int,
    micro_batch_size: int,
    data_rank: int,
    data_world: int,
    document_mask: bool,
    limit_windows: int | None = None,
    manifest: Manifest | None = None,
) -> Iterator[Batch]:
    """A held-out source from its beginning, in order: every token but the first is a target exactly once.

    Every rank gets the same number of batches, so that they may meet after each: the last windows may be short or
    empty, padded by targets of -100. `limit_windows` ends it early, over all ranks.

    Raises:
        ValueError: the source is unusable or damaged.
    """
    opened = TokenSource(source, sequence_length, manifest)
    try:
        manifest = opened.manifest
        windows = -(-max(0, manifest.tokens - 1) // sequence_length)
        if limit_windows is not None:
            windows = min(windows, limit_windows)
        per_step = micro_batch_size * data_world
        for first in range(data_rank * micro_batch_size, -(-windows // per_step) * per_step, per_step):
            yield _validation_batch(
                opened, range(first, first + micro_batch_size), windows, sequence_length, document_mask
            )
    finally:
        opened.close()


def _validation_batch(
    source: TokenSource, batch: Sequence[int], windows: int, sequence_length: int, document_mask: bool
) -> Batch:
    manifest = source.manifest
    tokens = np.full((len(batch), sequence_length + 1), manifest.eos_id, dtype=manifest.numpy_dtype)
    counts = np.zeros(len(batch), dtype=np.int64)
    for row, window in enumerate(batch):
        if window < windows:
            start = window * sequence_length
            content = source.read_tokens(start, min(sequence_length + 1, manifest.tokens - start))
            tokens[row, : len(content)] = content
            counts[row] = len(content) - 1
    made = make_batch(tokens, manifest.bos_id, manifest.eos_id, document_mask)
    made.targets[np.arange(sequence_length) >= counts[:, None]] = IGNORED_TARGET
    return made
