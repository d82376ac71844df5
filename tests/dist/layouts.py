"""The layouts that the parity matrix tries: pairwise over every axis, and the known traps.

A layout is a value of each axis. The product's own rules say which are possible; of any two values of two axes that
some possible layout has together, one of MATRIX has both. Rows are made one at a time, each the one that brings
together the most pairs not yet seen (Cohen, Dalal, Fredman and Patton 1997, "The AETG system: an approach to testing
based on combinatorial design", IEEE TSE 23(7), section 4); but where AETG draws candidates at random, here all of them
are looked at, so that the list is the same every time.
"""

import functools
import itertools
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, get_args

import numpy as np

from pretrain.layout import Layout
from tests.dist.layout_case import LayoutCase

AXES = {field.name: get_args(field.type) or (False, True) for field in fields(LayoutCase)}
del AXES["reduce_dtype"], AXES["compile"]  # with a tolerance and a cost of their own: listed by hand
# Axes whose value makes no layout possible or impossible; the test of this module holds that against the rules.
FREE = ("recompute", "accumulation", "tied", "document_mask", "z_loss")
BOUND = tuple(axis for axis in AXES if axis not in FREE)
# Which groups there are and what is split over them; every combination of these is tried, not only every pair.
TOPOLOGY = ("world", "tensor", "sequence", "expert", "model")

Pair = frozenset[tuple[str, Any]]


def possible(case: LayoutCase) -> bool:
    """Whether the product takes the layout."""
    try:
        Layout.of(case.config, case.world)
    except ValueError:
        return False
    return True


@functools.cache
def possible_cores(precision: str | None = None) -> tuple[tuple[Any, ...], ...]:
    """The values of BOUND of every possible layout, found by trying all of them; of one precision, if it is given."""
    axes = AXES if precision is None else AXES | {"precision": (precision,)}
    rows = itertools.product(*(axes[axis] for axis in BOUND))
    return tuple(row for row in rows if possible(LayoutCase(**dict(zip(BOUND, row, strict=True)))))


def pairs_of(case: LayoutCase) -> set[Pair]:
    """The pairs of values of two axes that a layout covers."""
    return set(map(frozenset, itertools.combinations(((axis, getattr(case, axis)) for axis in AXES), 2)))


@functools.cache
def possible_pairs(precision: str | None = None) -> frozenset[Pair]:
    """Every pair of values of two axes that some possible layout has; of one precision, if it is given."""
    cores = [list(zip(BOUND, core, strict=True)) for core in possible_cores(precision)]
    free = [(axis, value) for axis in FREE for value in AXES[axis]]
    pairs = itertools.chain(
        itertools.chain.from_iterable(itertools.combinations(core, 2) for core in cores),
        itertools.product(set(itertools.chain.from_iterable(cores)), free),
        ((a, b) for a, b in itertools.combinations(free, 2) if a[0] != b[0]),
    )
    return frozenset(map(frozenset, pairs))


class _Covering:
    """Which pairs are yet to be covered, as a symmetric table over all values of all axes."""

    def __init__(self, pairs: Iterable[Pair], precision: str | None) -> None:
        self.values = [(axis, value) for axis in AXES for value in AXES[axis]]
        self.number = {value: n for n, value in enumerate(self.values)}
        self.cores = np.array(
            [[self.number[value] for value in zip(BOUND, core, strict=True)] for core in possible_cores(precision)]
        )
        self.open = np.zeros((len(self.number), len(self.number)), dtype=bool)
        self.used = np.zeros(len(self.number), dtype=np.int64)
        self._mark(pairs, True)

    def _mark(self, pairs: Iterable[Pair], state: bool) -> None:
        for pair in pairs:
            i, j = (self.number[value] for value in pair)
            self.open[i, j] = self.open[j, i] = state

    def next_case(self) -> LayoutCase | None:
        """Of the layouts with the first open pair, the one that covers the most open pairs; None if none is open."""
        if not self.open.any():
            return None
        chosen = dict(self.values[n] for n in np.argwhere(self.open)[0])
        fits = [self.cores[:, BOUND.index(a)] == self.number[a, v] for a, v in chosen.items() if a in BOUND]
        cores = self.cores[np.logical_and.reduce([np.ones(len(self.cores), dtype=bool), *fits])]
        gain = np.zeros(len(cores), dtype=np.int64)
        for i, j in itertools.combinations(range(len(BOUND)), 2):
            gain += self.open[cores[:, i], cores[:, j]]
        for axis in FREE:  # at best: what the value that suits this core most would add
            gain += np.max([self.open[cores, n].sum(axis=1) for n in self._numbers(axis)], axis=0)
        # Among equals the one whose values were used least, so that what is tried is spread evenly.
        best = np.lexsort((self.used[cores].sum(axis=1), -gain))[0]
        chosen |= dict(self.values[n] for n in cores[best])
        for axis in FREE:
            known = [self.number[value] for value in chosen.items()]
            choices = [(-self.open[n, known].sum(), self.used[n], n) for n in self._numbers(axis)]
            chosen.setdefault(*self.values[min(choices)[2]])
        case = LayoutCase(**chosen)
        self._mark(pairs_of(case), False)
        self.used[[self.number[value] for value in chosen.items()]] += 1
        return case

    def _numbers(self, axis: str) -> list[int]:
        return [self.number[axis, value] for value in AXES[axis]]


def covering_layouts(pairs: Iterable[Pair], precision: str | None = None) -> list[LayoutCase]:
    """Layouts that cover these pairs, each of which some possible layout has; of one precision, if it is given."""
    return list(iter(_Covering(pairs, precision).next_case, None))


def pairs_of_all(cases: Iterable[LayoutCase]) -> set[Pair]:
    """The pairs that several layouts cover together."""
    return set(itertools.chain.from_iterable(map(pairs_of, cases)))


# Where layouts have gone wrong, or could while every pair is right.
TRAPS = (
    LayoutCase(tensor=4, num_kv_heads=1, zero_stage=0),  # every rank a copy of the one key and value head
    LayoutCase(tensor=4, num_kv_heads=2, tied=True, zero_stage=3),
    LayoutCase(sequence=4, num_kv_heads=1, zero_stage=2, document_mask=True),
    LayoutCase(sequence=4, num_kv_heads=2, zero_stage=3),
    LayoutCase(tensor=2, sequence=2, num_kv_heads=1, z_loss=True),
    LayoutCase(tensor=2, sequence=2, num_kv_heads=2, zero_stage=3, recompute="full", document_mask=True, tied=True),
    LayoutCase(tensor=2, expert=4, model="moe"),  # the experts' ranks are tensor and data parallel ones at once
    LayoutCase(tensor=4, expert=2, model="moebias", num_kv_heads=1, zero_stage=2),
    LayoutCase(sequence=2, expert=4, model="moebias", zero_stage=2, recompute="full"),
    LayoutCase(tensor=2, sequence=2, expert=2, model="moe", recompute="selective", z_loss=True),
    LayoutCase(expert=2, model="moe", zero_stage=3),
    LayoutCase(expert=4, model="moebias", optimizer="muon", tied=True),
    LayoutCase(world=2, tensor=2, model="moe", zero_stage=3, num_kv_heads=1),  # a router that every rank holds
    LayoutCase(tensor=2, zero_stage=2, precision="bf16", reduce_dtype="bf16"),
)


def _pairwise() -> list[LayoutCase]:
    """The traps, and every pair. In fp32 first, where the tolerance is a hundred times narrower than bf16's."""
    cases = list(TRAPS)
    for precision in ("fp32", None):
        seen = (case for case in cases if precision in (None, case.precision))
        cases += covering_layouts(possible_pairs(precision) - pairs_of_all(seen), precision)
    return cases


def _combinations(axes: tuple[str, ...], covered: Iterable[LayoutCase]) -> tuple[LayoutCase, ...]:
    """One fp32 layout for each possible combination of these axes' values that none covers; the rest take turns."""
    seen = {tuple(getattr(case, axis) for axis in axes) for case in covered if case.precision == "fp32"}
    cores: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for core in possible_cores("fp32"):
        values = dict(zip(BOUND, core, strict=True))
        cores.setdefault(tuple(values[axis] for axis in axes), []).append(values)
    frees = [dict(zip(FREE, row, strict=True)) for row in itertools.product(*(AXES[axis] for axis in FREE))]
    missing = [choices for combination, choices in cores.items() if combination not in seen]
    # Strides without a factor in common with how many there are to choose from, so that all get their turn.
    return tuple(
        LayoutCase(**choices[7 * turn % len(choices)], **frees[37 * turn % len(frees)])
        for turn, choices in enumerate(missing)
    )


def _by_world(cases: Iterable[LayoutCase]) -> tuple[LayoutCase, ...]:
    return tuple(sorted(dict.fromkeys(cases), key=lambda case: case.world))


_PAIRS = _pairwise()
MATRIX = _by_world((*_PAIRS, *_combinations(TOPOLOGY, _PAIRS)))
LONG = _by_world(
    (
        *_combinations((*TOPOLOGY, "zero_stage"), MATRIX),
        LayoutCase(tensor=2, zero_stage=1, compile=True),
        LayoutCase(world=2, zero_stage=3, compile=True, recompute="full"),
    )
)
