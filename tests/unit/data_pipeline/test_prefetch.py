import threading
import time
from collections.abc import Callable, Iterator

import pytest

from data_pipeline import prefetch
from data_pipeline.prefetch import Prefetcher


class Fetches:
    """What was fetched, in order."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.failing: set[int] = set()

    def __call__(self, number: int) -> None:
        self.numbers.append(number)
        if number in self.failing:
            raise OSError("no network")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> Fetches:
    monkeypatch.setattr(prefetch, "FETCHERS", 1)
    return Fetches()


@pytest.fixture
def prefetcher(fetches: Fetches) -> Iterator[Prefetcher]:
    made = Prefetcher(fetches, ahead=3)
    yield made
    made.close()


def test_in_order_and_not_too_far_ahead(fetches: Fetches, prefetcher: Prefetcher) -> None:
    prefetcher.want([5, 1, 4])
    prefetcher.want([1, 9, 2])
    wait_until(lambda: len(fetches.numbers) == 3)
    time.sleep(0.02)
    assert fetches.numbers == [5, 1, 4]
    prefetcher.taken(5)
    wait_until(lambda: len(fetches.numbers) == 4)
    prefetcher.taken(2)  # the reader was here first
    prefetcher.taken(1)
    prefetcher.taken(7)  # nobody said that
    time.sleep(0.02)
    assert fetches.numbers == [5, 1, 4, 9]
    prefetcher.want([5])  # again, after others
    wait_until(lambda: fetches.numbers == [5, 1, 4, 9, 5])


def test_a_failure_is_left_to_the_reader(fetches: Fetches, prefetcher: Prefetcher) -> None:
    fetches.failing = {0, 1, 2, 3}
    prefetcher.want(range(6))
    wait_until(lambda: fetches.numbers == [0, 1, 2, 3, 4, 5])
    fetches.failing = set()
    prefetcher.want([2])
    wait_until(lambda: fetches.numbers[6:] == [2])


def test_close_and_go_on(fetches: Fetches, prefetcher: Prefetcher) -> None:
    before = threading.active_count()
    prefetcher.want(range(10))
    wait_until(lambda: len(fetches.numbers) == 3)
    assert threading.active_count() == before + 1
    prefetcher.close()
    prefetcher.close()
    assert threading.active_count() == before
    prefetcher.want([20, 21])
    wait_until(lambda: fetches.numbers[3:] == [20, 21])


def test_several_at_once() -> None:
    met = threading.Event()
    together = threading.Barrier(prefetch.FETCHERS, action=met.set)
    made = Prefetcher(lambda number: together.wait(60) and None, ahead=prefetch.FETCHERS)
    made.want(range(prefetch.FETCHERS))
    assert met.wait(60)
    made.close()
