"""Whether a run that was killed many times is the run that nobody disturbed, but for rounding."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.run_dir import read_events

# What does not depend on the layout, and must repeat in every digit: which samples a step has seen, and its schedule.
EXACT = ("position", "tokens", "lr")
# The loss may differ by three times what two undisturbed runs on different layouts differ by; or the last digit of an
# fp32 loss, since on few steps those may happen to agree more closely than they can be trusted to.
LOSS_FACTOR = 3.0
# The norm of a gradient differs now and then, on a step of few rare tokens, by many times what is usual: two runs say
# too little about how much. It is held to this part of its value; wrong ones are off by far more.
NORM_TOLERANCE = 1e-4

Curve = Mapping[int, Mapping[str, Any]]


def read_curve(events_path: Path) -> Curve:
    """The event of each step by its number; of a step made more than once, the last."""
    return {event["step"]: event for event in read_events(events_path, "step")}


@dataclass(frozen=True)
class Gap:
    """How far a storm's curve is from an undisturbed one, and that from another.

    storm, undisturbed: maxima over all steps of |storm - A| and |A - B|; `at_step`: where the former is reached.
    allowed: what the former may be.
    """

    storm: float
    undisturbed: float
    at_step: int
    allowed: float

    @property
    def ok(self) -> bool:
        return self.storm <= self.allowed


@dataclass(frozen=True)
class Comparison:
    """What a storm has done to a run of `steps` steps.

    problems: steps that are missing, too many, or not the undisturbed run's in what must be exact, in words.
    """

    steps: int
    problems: tuple[str, ...]
    loss: Gap | None
    grad_norm: Gap | None

    @property
    def ok(self) -> bool:
        gaps = (self.loss, self.grad_norm)
        return not self.problems and all(gap is not None and gap.ok for gap in gaps)


def compare(storm: Curve, a: Curve, b: Curve, steps: int) -> Comparison:
    """Compare three curves of steps 1 to `steps`."""
    wanted = set(range(1, steps + 1))
    problems = []
    for name, curve in (("storm", storm), ("undisturbed A", a), ("undisturbed B", b)):
        if missing := sorted(wanted - set(curve)):
            problems.append(f"{name}: step {missing[0]} is missing ({len(missing)} in all)")
        if beyond := sorted(set(curve) - wanted):
            problems.append(f"{name}: step {beyond[0]} is beyond the end ({len(beyond)} in all)")
        for key in ("loss", "grad_norm"):
            if not np.isfinite(values(curve, key)).all():
                problems.append(f"{name}: {key} is not a number on every step")
    if problems:
        return Comparison(steps, tuple(problems), None, None)
    for name, curve in (("storm", storm), ("undisturbed B", b)):
        for key in EXACT:
            wrong = [step for step in sorted(wanted) if curve[step][key] != a[step][key]]
            if wrong:
                was, is_now = a[wrong[0]][key], curve[wrong[0]][key]
                problems.append(f"{name}: {key} of step {wrong[0]} is {is_now}, not {was} ({len(wrong)} steps in all)")
    return Comparison(steps, tuple(problems), _loss_gap(storm, a, b), _norm_gap(storm, a, b))


def values(curve: Curve, key: str) -> np.ndarray:
    """One figure of each step, in order."""
    return np.array([curve[step][key] for step in sorted(curve)], dtype=np.float64)


def _loss_gap(storm: Curve, a: Curve, b: Curve) -> Gap:
    losses = values(a, "loss")
    off, apart = (np.abs(values(curve, "loss") - losses) for curve in (storm, b))
    difference = max(float(apart.max()), float(np.spacing(np.float32(losses.max()))))
    return Gap(float(off.max()), float(apart.max()), int(off.argmax()) + 1, LOSS_FACTOR * difference)


def _norm_gap(storm: Curve, a: Curve, b: Curve) -> Gap:
    """Relative to the norm itself."""
    size = np.abs(values(a, "grad_norm"))
    off, apart = (np.abs(values(curve, "grad_norm") - values(a, "grad_norm")) / size for curve in (storm, b))
    return Gap(float(off.max()), float(apart.max()), int(off.argmax()) + 1, NORM_TOLERANCE)
