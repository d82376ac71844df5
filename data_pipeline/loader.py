"""Batches for one rank: shards -> order -> loader -> train.

A background thread prepares the next global batches. Worker processes would cost more than they bring: tokens are only
copied here, at several times the speed of the fastest training step.
"""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from data_pipeline.batch import Batch, join_extents
from data_pipeline.config import DataConfig
from data_pipeline.manifest import Manifest
from data_pipeline.order import Stage
from data_pipeline.run_order import open_order
from data_pipeline.samples import Extents, placed
from data_pipeline.token_source import open_sources

Item = TypeVar("Item")
Result = TypeVar("Result")

PREFETCHED = 2
"""Global batches that wait ready; small ones that were read at once count as one."""
TOKENS_AT_ONCE = 1 << 16
"""Small global batches are read at once up to so many tokens, which spreads what it costs to hand them over, and makes
large arrays: small ones, made by one thread and dropped by another, come back as page faults each time."""
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
        self._ready: queue.Queue[list[list[Batch]] | BaseException] = queue.Queue(maxsize=PREFETCHED)
        self._next: deque[list[Batch] | BaseException] = deque()
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
        self._next.popleft()
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
        if not self._next:
            item = self._ready.get()
            self._next.extend([item] if isinstance(item, BaseException) else item)
        return self._next[0]

    def _prefetch(self) -> None:
        try:
            for shares in self._located_ahead():
                for batches in _good_ones(self._read, shares):
                    if not self._put(batches):
                        return
            self._put(StopIteration())
        except BaseException as error:  # handed over and raised in the thread that asks
            self._put(error)

    def _put(self, item: list[list[Batch]] | BaseException) -> bool:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def _located_ahead(self) -> "Iterator[list[_Share]]":
        """This rank's share of each global batch, as many a time as are read at once.

        Each has been announced to the sources so many samples before; not the very first, which is waited for: it is
        located and read by itself.
        """
        ahead: deque[_Share] = deque()
        samples_ahead = 0
        wanted, tokens_at_once = 1, 0
        shares = self._located()
        failure: Exception | None = None
        more = True
        while more or ahead:
            while more and samples_ahead < wanted:
                try:
                    share = next(shares)
                except StopIteration:
                    more = False
                except Exception as error:  # it matters once what comes before is used up, which it may never be
                    more, failure = False, error
                else:
                    ahead.append(share)
                    samples_ahead += share.samples
            if ahead:
                together = [ahead.popleft()]
                while ahead and ahead[0].fits(together[0], tokens_at_once):
                    together.append(ahead.popleft())
                samples_ahead -= sum(share.samples for share in together)
                wanted, tokens_at_once = SAMPLES_AHEAD, TOKENS_AT_ONCE
                yield together
        if failure is not None:
            raise failure

    def _located(self) -> "Iterator[_Share]":
        plans = list(itertools.islice(self._plan, 1))
        while plans:
            for shares in _good_ones(self._locate, plans):
                yield from shares
            plans = self._some_plans()

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
        located = _Located(source_of, extents)
        ends = itertools.accumulate(map(len, positions), initial=0)
        return [
            _Share(located, first, end, self._order.sequence_length_at(plan[0]))
            for plan, (first, end) in zip(plans, itertools.pairwise(ends), strict=True)
        ]

    def _positions(self, first: int, count: int) -> np.ndarray:
        share = count // self._data_world
        assert share * self._data_world == count
        assert share % self._micro_batch_size == 0
        return first + self._data_rank * share + np.arange(share)

    def _read(self, shares: "list[_Share]") -> list[list[Batch]]:
        """The micro-batches of each of some shares that follow each other and fit together."""
        located = shares[0].located
        first = located.extents.first[shares[0].first : shares[-1].end + 1]
        chosen = slice(first[0], first[-1])
        source_of, starts, counts = located.source[chosen], located.extents.start[chosen], located.extents.count[chosen]
        places = np.concatenate([[0], np.cumsum(counts + 1)])
        tokens = np.empty(places[-1], dtype=self._dtype)
        for source, opened in enumerate(self._opened):
            of_source = np.flatnonzero(source_of == source)
            start, count = starts[of_source], counts[of_source] + 1
            at_end = start + count > opened.tokens
            tokens[places[of_source[at_end] + 1] - 1] = self._eos_id  # nothing follows the stream's last token
            opened.read(start, count - at_end, tokens, places[of_source])
        batch = join_extents(
            tokens,
            counts,
            first - first[0],
            shares[0].sequence_length,
            self._bos_id,
            self._eos_id,
            self._document_mask,
            self._whole,
        )
        micro_batches = iter(batch.split(self._micro_batch_size))
        return [list(itertools.islice(micro_batches, share.samples // self._micro_batch_size)) for share in shares]


def _good_ones(work: Callable[[list[Item]], list[Result]], items: list[Item]) -> Iterator[list[Result]]:
    """What the work makes of some items, of all at once; if that fails, one by one, so that the good ones are served.

    Raises what the work on a single item does.
    """
    try:
        done = work(items)
    except (ValueError, OSError):
        if len(items) == 1:
            raise
        for item in items:
            yield work([item])
    else:
        yield done


@dataclass(frozen=True)
class _Located:
    """Samples of this rank, in the order in which they are served."""

    source: np.ndarray
    """Of each extent, its place in the order's `sources`: `(m,)`."""
    extents: Extents


@dataclass(frozen=True)
class _Share:
    """This rank's samples of one global batch: `first` to `end` of those that were located at once."""

    located: _Located
    first: int
    end: int
    sequence_length: int

    @property
    def samples(self) -> int:
        return self.end - self.first

    def fits(self, other: "_Share", tokens: int) -> bool:
        """Whether it can be read at once with an earlier one and those between: at most so many tokens together."""
        same = self.located is other.located and self.sequence_length == other.sequence_length
        return same and (self.end - other.first) * self.sequence_length <= tokens
