"""A guard of the step's speed that needs no clock: what a step asks of the machine stays what it is known to be.

The model is so small that these are counts of the code, not of the work. Where a number falls,
write the new one; where it rises, know why.
"""

import functools
from dataclasses import dataclass
from typing import Any

import pytest

from tests.dist.harness import run_cases

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Expected:
    """collectives: kind -> [calls, bytes], exact. The rest may be less, and by SLACK more: another version of torch
    takes an operator more here and there. peak_bytes: of live tensors, at the most."""

    collectives: dict[str, list[int]]
    operators: int
    costly: dict[str, int]
    peak_bytes: int


SLACK = 1.03
# On every layout: DeepSpeed asks whether the norm is a number, and `agree` reads all else that there is to know.
HOST_READS = {"__bool__": 1, "tolist": 1}
PARAMETERS = 40_096
GRADIENTS = 4 * PARAMETERS  # bytes: they are reduced in fp32, all in one bucket
# How many targets count, the squared norm, and the status of six numbers, in fp64.
SMALL_CALLS, SMALL_BYTES = 3, 8 + 8 + 48
# Two groups of parameters, with weight decay and without, are gathered in bf16 after the step.
GATHERED = [2, 2 * PARAMETERS]
# A global batch of 8 sequences is 4 micro-batches for one rank, 2 for each of two. Stage 1 reduces gradients once, and
# accumulates them in whole; stage 2 reduces each micro-batch's and keeps its share. One rank has nothing to reduce.
# "tiled" is stage 1 where a processor multiplies tiles, and torch's kernel does attention's forward pass.
ALONE = Expected(
    collectives={"allreduce": [SMALL_CALLS, SMALL_BYTES]},
    operators=4312,
    costly={
        "mm": 180,
        "bmm": 24,
        "baddbmm": 32,
        "copy_": 255,
        "_to_copy": 155,
        "clone": 60,
        "cat": 34,
        "fill_": 4,
        "zero_": 2,
    },
    peak_bytes=966_900,
)
EXPECTED = {
    (1, "zero1"): ALONE,
    (1, "zero2"): ALONE,
    (1, "tiled"): Expected(
        collectives={"allreduce": [SMALL_CALLS, SMALL_BYTES]},
        operators=4064,
        costly={
            "mm": 180,
            "bmm": 16,
            "baddbmm": 24,
            "copy_": 247,
            "_to_copy": 155,
            "clone": 36,
            "cat": 34,
            "fill_": 4,
            "zero_": 2,
        },
        peak_bytes=966_900,
    ),
    (2, "zero1"): Expected(
        collectives={"allreduce": [SMALL_CALLS + 1, SMALL_BYTES + GRADIENTS], "allgather_base": GATHERED},
        operators=2441,
        costly={"mm": 90, "bmm": 12, "baddbmm": 16, "copy_": 153, "_to_copy": 124, "clone": 30, "cat": 19, "fill_": 2},
        peak_bytes=1_126_324,
    ),
    (2, "tiled"): Expected(
        collectives={"allreduce": [SMALL_CALLS + 1, SMALL_BYTES + GRADIENTS], "allgather_base": GATHERED},
        operators=2317,
        costly={"mm": 90, "bmm": 8, "baddbmm": 12, "copy_": 149, "_to_copy": 124, "clone": 18, "cat": 19, "fill_": 2},
        peak_bytes=1_126_324,
    ),
    (2, "zero2"): Expected(
        collectives={"allreduce": [SMALL_CALLS + 2, SMALL_BYTES + 2 * GRADIENTS], "allgather_base": GATHERED},
        operators=2604,
        costly={"mm": 90, "bmm": 12, "baddbmm": 16, "copy_": 188, "_to_copy": 82, "clone": 30, "cat": 20, "fill_": 2},
        peak_bytes=962_200,
    ),
}


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The counts of all cases, on one rank and on two, each counted once."""

    @functools.cache
    def on(nproc: int) -> dict[str, Any]:
        return run_cases("tests.dist.step_count_cases", nproc, tmp_path_factory.mktemp(f"ranks{nproc}"))

    return on


@pytest.mark.parametrize(("nproc", "case"), EXPECTED)
def test_the_host_reads_once_beside_deepspeed(counts: Any, nproc: int, case: str) -> None:
    """A read waits for all that the device has been asked to do."""
    found = counts(nproc)[case]
    assert found["host_reads"] == HOST_READS
    # Below Python as well: torch's own operators read nothing. A list is made without one.
    assert found["reads_in_operators"] == 1


@pytest.mark.parametrize(("nproc", "case"), EXPECTED)
def test_collectives(counts: Any, nproc: int, case: str) -> None:
    assert counts(nproc)[case]["collectives"] == EXPECTED[nproc, case].collectives


@pytest.mark.parametrize(("nproc", "case"), EXPECTED)
def test_operators_and_memory(counts: Any, nproc: int, case: str) -> None:
    found, expected = counts(nproc)[case], EXPECTED[nproc, case]
    assert found["compilations"] == 0
    assert found["operators"] <= SLACK * expected.operators
    over = {name: n for name, n in found["costly"].items() if n > SLACK * expected.costly.get(name, 0)}
    assert not over, f"more than {expected.costly}"
    assert found["peak_bytes"] <= SLACK * expected.peak_bytes
