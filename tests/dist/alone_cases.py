"""Cases for test_communication.py on one rank: 4 micro-batches a step, summed at once, and by DeepSpeed's own ways.

At stage 2 these round the gradients of routers, which are in fp32, unless they wait in fp32 (`stage_in_fp32`).
"""

from collections.abc import Callable
from typing import Any

import torch

from pretrain import deepspeed_reduction
from tests.dist.communication_cases import KINDS, trained


def by_deepspeed(kind: str, stage: int, idle: bool = False) -> list[Any]:
    at_once = deepspeed_reduction.sum_where_alone
    deepspeed_reduction.sum_where_alone = lambda engine: None
    try:
        return trained(kind, stage, idle=idle)
    finally:
        deepspeed_reduction.sum_where_alone = at_once


def idle(run: Callable[..., list[Any]], stage: int) -> list[Any]:
    torch.use_deterministic_algorithms(True)  # then memory that nobody has written is no number
    try:
        return run("dense", stage, idle=True)
    finally:
        torch.use_deterministic_algorithms(False)


WAYS = {"at once": trained, "by deepspeed": by_deepspeed}
CASES = {
    f"{kind} zero{stage} {way}": lambda kind=kind, stage=stage, run=run: run(kind, stage)
    for kind in KINDS
    for stage in (1, 2)
    for way, run in WAYS.items()
} | {
    f"idle zero{stage} {way}": lambda stage=stage, run=run: idle(run, stage)
    for stage in (1, 2)
    for way, run in WAYS.items()
}
