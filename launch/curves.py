"""Numbers of every step of a run, as arrays, and how they are drawn with few points and without a lie. No torch."""

import math
from array import array
from dataclasses import dataclass

import numpy as np

# What is kept of a step event; expert_imbalance: the busiest expert's load over the mean, the mean over layers.
COLUMNS = ("loss", "grad_norm", "lr", "tokens_per_second", "mfu", "expert_imbalance")
# More points than a plot has pixels across are drawn as an envelope.
BINS = 800


class StepCurves:
    """The steps of one history, rising. `taken_back` has those that were made and then given up, each stretch apart."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._values = {name: array("d") for name in COLUMNS}
        self.taken_back: list[StepCurves] = []

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def steps(self) -> np.ndarray:
        """(n,) int64."""
        return np.array(self._steps, dtype=np.int64)

    def column(self, name: str) -> np.ndarray:
        """(n,) float64, one of COLUMNS; nan where a step has no such number."""
        return np.array(self._values[name], dtype=np.float64)

    def add(self, event: dict[str, object]) -> None:
        """A step event. If a step of its number was made before, that and what followed are taken back."""
        step = event["step"]
        assert isinstance(step, int)
        self.take_back(step - 1)
        self._steps.append(step)
        imbalances = event.get("expert_load_max_over_mean")
        numbers = dict(event)
        if isinstance(imbalances, dict):
            numbers["expert_imbalance"] = math.fsum(imbalances.values()) / len(imbalances)
        for name, values in self._values.items():
            number = numbers.get(name)
            values.append(float(number) if isinstance(number, int | float) else math.nan)

    def take_back(self, step: int) -> None:
        """The steps after this one are no part of the run any more."""
        stays = len(self._steps)
        while stays and self._steps[stays - 1] > step:
            stays -= 1
        if stays == len(self._steps):
            return
        given_up = StepCurves()
        given_up._steps = self._steps[stays:]
        given_up._values = {name: values[stays:] for name, values in self._values.items()}
        self.taken_back.append(given_up)
        del self._steps[stays:]
        for values in self._values.values():
            del values[stays:]


@dataclass(frozen=True)
class Envelope:
    """Of at most `bins` stretches of the abscissa: where each is, and the least, mean and greatest finite number in it.

    exact: there is one number in each, so that nothing is left out.
    """

    x: np.ndarray
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray
    exact: bool


def envelope(x: np.ndarray, y: np.ndarray, bins: int = BINS) -> Envelope:
    """Draw `y` over rising `x`, both (n,), with few points: no extreme is lost. What is not finite is left out."""
    finite = np.isfinite(y)
    x, y = x[finite].astype(np.float64), y[finite]
    if len(x) <= bins:
        return Envelope(x, y, y, y, exact=True)
    edges = np.linspace(x[0], x[-1], bins + 1)
    places = np.unique(np.searchsorted(x, edges[:-1]))
    counts = np.diff(np.append(places, len(x)))
    return Envelope(
        np.add.reduceat(x, places) / counts,
        np.minimum.reduceat(y, places),
        np.add.reduceat(y, places) / counts,
        np.maximum.reduceat(y, places),
        exact=False,
    )


def smoothing_window(points: int) -> int:
    """Over how many steps a curve is smoothed: a hundredth of them all; of few, a tenth, at most 20."""
    return max(1, min(20, points // 10), points // 100)


def smoothed(y: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last `window` finite numbers at each place, (n,); of as many as there are at the beginning. It
    never looks ahead, so a curve does not fall before the run did."""
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    ends = np.arange(1, len(y) + 1)
    begins = np.maximum(ends - window, 0)
    found = counts[ends] - counts[begins]
    return np.where(found > 0, (sums[ends] - sums[begins]) / np.maximum(found, 1), np.nan)
