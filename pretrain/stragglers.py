"""Which ranks are slower than the others, from each rank's own seconds of forward passes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, median_low

import torch.distributed as dist

from pretrain.config import HealthConfig
from pretrain.parallel_dims import gathered


@dataclass(frozen=True)
class Straggler:
    """A rank whose forward pass takes `ratio` times as long as the median rank's."""

    rank: int
    host: str
    ratio: float

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} is slow: its forward passes take {self.ratio:.2f} times the median's"


def slow_ranks(seconds: Sequence[float], ratio: float) -> dict[int, float]:
    """Ranks whose seconds are more than `ratio` times the median over the ranks, and how many times.

    Of an even number the lower median, so that of two ranks the slower one can be told by the other.
    """
    usual = median_low(seconds)
    return {rank: own / usual for rank, own in enumerate(seconds) if own > ratio * usual}


class Stragglers:
    """Looks for slow ranks every `straggler_every_steps` steps, by the median of each one's steps since.

    A rank is named when it is slow twice in a row, and again only after it was not: neither a pause of Python's nor
    another program's short work names it.

    The seconds are those of a step's first forward pass, whose beginning no rank waits for: a rank with a slow device,
    a throttled clock or a busy processor shows there, while in a whole step all take as long as the slowest. But where
    a forward pass meets other ranks inside, all who meet take as long as the slowest of them. So of ranks that share
    tensors, sequences or experts a whole group is named, with the slow one in it, and under ZeRO 3, which gathers
    parameters from all, no one is.
    """

    def __init__(self, config: HealthConfig, group: dist.ProcessGroup | None) -> None:
        self.config, self.group = config, group
        self._seconds: list[float] = []
        self._slow: set[int] = set()  # at the last look
        self._named: set[int] = set()

    def after_step(self, step: int, forward_seconds: float) -> list[Straggler]:
        """Who is to be named after this step; mostly nobody. Collective every so many steps."""
        every = self.config.straggler_every_steps
        if self.group is None or not every:
            return []
        self._seconds.append(forward_seconds)
        if step % every:
            return []
        everyone = gathered((os.uname().nodename, median(self._seconds)), self.group)
        self._seconds.clear()
        hosts, seconds = zip(*everyone, strict=True)
        return [Straggler(rank, hosts[rank], ratio) for rank, ratio in self.judged(seconds).items()]

    def judged(self, seconds: Sequence[float]) -> dict[int, float]:
        """One look: the ranks to be named now, with their ratios. seconds: of each rank."""
        slow = slow_ranks(seconds, self.config.straggler_ratio)
        again = slow.keys() & self._slow
        new = {rank: slow[rank] for rank in sorted(again - self._named)}
        self._slow, self._named = set(slow), again
        return new
