"""Who is slow, and when that is said."""

import time

import pytest
import torch

from pretrain.config import HealthConfig
from pretrain.device import Stopwatch
from pretrain.stragglers import Straggler, Stragglers, slow_ranks

EVEN, ONE_SLOW = [1.0, 1.1, 0.9, 1.0], [1.0, 1.0, 1.6, 1.0]


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        (EVEN, {}),
        (ONE_SLOW, {2: 1.6}),
        ([1.0, 1.5, 1.0], {}),  # just the ratio is not more
        ([1.0, 2.0], {1: 2.0}),
        ([2.0, 1.0, 1.0, 2.0, 1.0, 1.0], {0: 2.0, 3: 2.0}),  # a group
        ([3.0], {}),
    ],
)
def test_slow_is_far_above_the_median(seconds: list[float], slow: dict[int, float]) -> None:
    assert slow_ranks(seconds, 1.5) == pytest.approx(slow)


def test_named_when_slow_twice_in_a_row_and_again_only_after_it_was_not() -> None:
    stragglers = Stragglers(HealthConfig(), None)
    other = [1.0, 1.6, 1.6, 1.0]
    looks = [ONE_SLOW, EVEN, ONE_SLOW, ONE_SLOW, other, other, EVEN, ONE_SLOW, ONE_SLOW]
    assert [list(stragglers.judged(look)) for look in looks] == [[], [], [], [2], [], [1], [], [], [2]]


def test_a_single_rank_is_never_slow() -> None:
    stragglers = Stragglers(HealthConfig(straggler_every_steps=1), None)
    assert [stragglers.after_step(step, 1.0) for step in (1, 2, 3)] == [[], [], []]


def test_the_line_for_a_person() -> None:
    said = str(Straggler(3, "n2", 1.618))
    assert said == "rank 3 on n2 is slow: its forward passes take 1.62 times the median's"


def test_the_stopwatch_on_a_processor() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for seconds in (0.05, 0.01):
        watch.start()
        time.sleep(seconds)
        watch.stop()
        assert seconds <= watch.seconds < seconds + 0.2
