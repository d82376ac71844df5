"""Batches for one rank: shards -> order -> loader -> train.

A background thread prepares the next global batch. Worker processes would cost more than they bring: tokens are only
copied here, at several times the speed of the fastest training step.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from data_pipeline.batch import Batch, join_extents
from data_pipeline.config import CacheConfig, DataConfig, SourceConfig
from data_pipeline.manifest import Manifest
from data_pipeline.order import Stage
from data_pipeline.run_order import open_order
from data_pipeline.samples import Extents, placed
from data_pipeline.token_source import TokenSource, open_sources

PREFETCHED = 2
"""Global batches that wait ready."""
SAMPLES_AHEAD = 2048
"""Positions whose order is worked out at once, which spreads numpy's cost a call, and so long before they are read, so
that what lies elsewhere is fetched by then."""
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
            data: the sources and how they are cut and shuffled; the weights and lengths that count are of `stages`.
            seed: of the run.
            stages: mixtures and sequence lengths by ascending start, see `SampleOrder`.
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
        sources = open_sources(data.sources, manifests, data.cache)
        self._order = open_order(data, seed, stages, sources)
        self._opened = [sources[name] for name in self._order.sources]
        manifest = self._opened[0].manifest
        self._dtype = manifest.numpy_dtype
        self._bos_id, self._eos_id = manifest.bos_id, manifest.eos_id
        self._whole = data.packing == "best_fit"
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
        for source in self._opened:
            source.close()

    def _peek(self) -> list[Batch] | BaseException:
        assert not self._closing.is_set(), "the loader was closed"
        if self._next is None:
            self._next = self._ready.get()
        return self._next

    def _prefetch(self) -> None:
        try:
            for share in self._located_ahead():
                if not self._put(self._micro_batches(share)):
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

    def _located_ahead(self) -> "Iterator[_Share]":
        """This rank's share of each global batch. Each has been announced to the sources so many samples before."""
        ahead: deque[_Share] = deque()
        samples_ahead = 0
        shares = self._located()
        failure: Exception | None = None
        more = True
        while more or ahead:
            while more and samples_ahead < SAMPLES_AHEAD:
                try:
                    share = next(shares)
                except StopIteration:
                    more = False
                except Exception as error:  # it matters once what comes before is used up, which it may never be
                    more, failure = False, error
                else:
                    ahead.append(share)
                    samples_ahead += len(share.extents)
            if ahead:
                samples_ahead -= len(ahead[0].extents)
                yield ahead.popleft()
        if failure is not None:
            raise failure

    def _located(self) -> "Iterator[_Share]":
        while plans := self._some_plans():
            try:
                located = self._locate(plans)
            except (ValueError, OSError):
                for plan in plans:  # the good ones among them are served
                    yield from self._locate([plan])
            else:
                yield from located

    def _some_plans(self) -> list[tuple[int, int]]:
        plans: list[tuple[int, int]] = []
        samples = 0
        while len(plans) < PLANS_AHEAD and samples < SAMPLES_AHEAD and (plan := next(self._plan, None)):
            plans.append(plan)
            samples += plan[1] // self._data_world
        return plans

    def _locate(self, plans: list[tuple[int, int]]) -> "list[_Share]":
        """Where the samples of this rank's shares of some global batches lie, of all of them at once."""
        positions = [self._positions(*plan) for plan in plans]
        picked = self._order.samples(np.concatenate(positions))
        parts = []
        for source, cut in np.unique(np.stack([picked.source, picked.cut]), axis=1).T.tolist():
            places = np.flatnonzero((picked.source == source) & (picked.cut == cut))
            parts.append((places, self._order.extents(source, cut, picked.number[places])))
        extents = placed(parts)
        source_of = np.repeat(picked.source, np.diff(extents.first))
        for source, opened in enumerate(self._opened):
            chosen = source_of == source
            # With the token that follows each extent, its last target, where the stream has one.
            start = extents.start[chosen]
            opened.prefetch(start, np.minimum(extents.count[chosen] + 1, opened.tokens - start))
        located, first = [], 0
        for plan, of_plan in zip(plans, positions, strict=True):
            end = first + len(of_plan)
            begin, stop = extents.first[first], extents.first[end]
            share = Extents(
                extents.first[first : end + 1] - begin, extents.start[begin:stop], extents.count[begin:stop]
            )
            located.append(_Share(self._order.sequence_length_at(plan[0]), source_of[begin:stop], share))
            first = end
        return located

    def _positions(self, first: int, count: int) -> np.ndarray:
        share = count // self._data_world
        assert share * self._data_world == count
        assert share % self._micro_batch_size == 0
        return first + self._data_rank * share + np.arange(share)

    def _micro_batches(self, share: "_Share") -> list[Batch]:
        extents = share.extents
        ends = np.cumsum(extents.count + 1)
        places = np.concatenate([[0], ends])
        tokens = np.empty(places[-1], dtype=self._dtype)
        for source, opened in enumerate(self._opened):
            chosen = np.flatnonzero(share.source == source)
            start, count = extents.start[chosen], extents.count[chosen] + 1
            at_end = start + count > opened.tokens
            tokens[ends[chosen[at_end]] - 1] = self._eos_id  # nothing follows the stream's last token
            opened.read(start, count - at_end, tokens, places[chosen])
        batches = []
        for row in range(0, len(extents), self._micro_batch_size):
            first = extents.first[row : row + self._micro_batch_size + 1]
            batches.append(
                join_extents(
                    tokens[places[first[0]] : places[first[-1]]],
                    extents.count[first[0] : first[-1]],
                    first - first[0],
                    share.sequence_length,
                    self._bos_id,
                    self._eos_id,
                    self._document_mask,
                    self._whole,
                )
            )
        return batches


@dataclass(frozen=True)
class _Share:
    """This rank's samples of one global batch."""

    sequence_length: int
    source: np.ndarray
    """Of each extent, its place in the order's `sources`: `(m,)`."""
    extents: Extents


def validation_batches(
    source: SourceConfig,
    sequence_length: int,
    micro_batch_size: int,
    data_rank: int,
    data_world: int,
    document_mask: bool,
    limit_windows: int | None = None,
    manifest: Manifest | None = None,
    cache: CacheConfig | None = None,
) -> Iterator[Batch]:
    """A held-out source from its beginning, in order: every token but the first is a target exactly once.

    Windows, however the training data is packed, so that losses can be compared. Every rank gets the same number of
    batches, so that they may meet after each: the last windows may be short or empty, padded by targets of -100.
    `limit_windows` ends it early, over all ranks. `cache`: where a source that lies elsewhere is kept meanwhile.

    Raises:
        ValueError: the source is unusable or damaged.
        OSError: it cannot be read now.
    """
    opened = TokenSource(source.path, manifest, cache)
    try:
        inputs = max(0, opened.tokens - 1)
        if limit_windows is not None:
            inputs = min(inputs, limit_windows * sequence_length)
        per_step = micro_batch_size * data_world
        windows = -(-inputs // sequence_length)
        for first in range(data_rank * micro_batch_size, -(-windows // per_step) * per_step, per_step):
            start = np.minimum((first + np.arange(micro_batch_size)) * sequence_length, inputs)
            count = np.minimum(sequence_length, inputs - start)
            row = np.concatenate([[0], np.cumsum(count > 0)])
            start, count = start[count > 0], count[count > 0]
            place = np.concatenate([[0], np.cumsum(count + 1)])
            tokens = np.empty(place[-1], dtype=opened.dtype)
            opened.read(start, count + 1, tokens, place[:-1])
            bos_id, eos_id = opened.manifest.bos_id, opened.manifest.eos_id
            yield join_extents(tokens, count, row, sequence_length, bos_id, eos_id, document_mask, False)
    finally:
        opened.close()
