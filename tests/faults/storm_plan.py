"""What a kill storm does, drawn from a seed: which layout each attempt has, when it is killed and whom that hits."""

import json
import random
from dataclasses import dataclass, replace
from typing import Any, Literal

from pretrain.config import ParallelConfig

Model = Literal["dense", "moe"]
Moment = Literal["starting", "training", "saving"]
Target = Literal["all", "one rank", "launcher"]

GLOBAL_BATCH = 8
MOST_STEPS = 6  # of an attempt before it is killed
# starting: before it has loaded its checkpoint, while ranks start, meet and read. saving: once a save has begun.
MOMENTS: dict[Moment, float] = {"starting": 0.1, "training": 0.5, "saving": 0.4}
TARGETS: dict[Target, float] = {"all": 0.5, "one rank": 0.3, "launcher": 0.2}
SETTINGS = ("precision=fp32", "evaluation.every_steps=0", "checkpoint.keep=2")
# Learning rates at which the small models are no chaotic systems: two undisturbed runs on different layouts differ in
# the last digit of an fp32 loss even after hundreds of steps, so that whatever is not rounding stands out. A router's
# choice between two equal scores is decided by rounding, and what that changes would soon upset others at a high rate.
MODEL_SETTINGS: dict[Model, tuple[str, ...]] = {
    "dense": ("optimizer={lr: 1e-3, eps: 1e-6}",),
    "moe": (
        "optimizer={lr: 1e-4, eps: 1e-6}",
        "model.moe={experts: 8, experts_per_token: 2, expert_ffn_size: 16, shared_experts: 1, first_layer: 1, "
        "router: sigmoid, balance: bias, bias_update_rate: 1e-4}",
    ),
}


@dataclass(frozen=True)
class Setup:
    """How one attempt at the run is laid out, and after how many steps it saves (0: only at its end)."""

    ranks: int
    parallel: ParallelConfig
    micro_batch_size: int
    save_every: int

    def words(self) -> list[str]:
        """The words of `steppe train` or `steppe resume` that say so."""
        parallel = json.dumps(self.parallel.model_dump(mode="json"))
        settings = (
            f"parallel={parallel}",
            f"batch.micro_batch_size={self.micro_batch_size}",
            f"checkpoint.every_steps={self.save_every}",
        )
        return ["--nproc", str(self.ranks), *(word for setting in settings for word in ("--set", setting))]

    @property
    def name(self) -> str:
        parallel = self.parallel
        degrees = {"tensor": parallel.tensor, "sequence": parallel.sequence, "expert": parallel.expert}
        offloaded = [name for name in ("optimizer", "parameters") if getattr(parallel, f"offload_{name}") == "cpu"]
        return ", ".join(
            [
                f"{self.ranks} rank{'s' * (self.ranks > 1)}",
                f"ZeRO {parallel.zero_stage}",
                *(f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1),
                *([f"offload {' and '.join(offloaded)}"] if offloaded else []),
            ]
        )


@dataclass(frozen=True)
class Kill:
    """One attempt and its end.

    after_steps: how many steps it makes at least, unless it dies while starting.
    delay: how long after that, as a part of the time that starting, a step with its save, or a save takes.
    which: of the ranks, in the order of their numbers, the one at this part of the list.
    """

    setup: Setup
    target: Target
    moment: Moment
    after_steps: int
    delay: float
    which: float


def layouts(model: Model) -> list[tuple[int, ParallelConfig]]:
    """(ranks, layout) that an attempt may have: each ZeRO stage, each kind of parallelism, offload."""
    moved = {"offload_optimizer": "cpu", "offload_parameters": "cpu"}
    rows: list[tuple[int, dict[str, Any]]] = [
        *((ranks, {"zero_stage": stage}) for ranks in (1, 2) for stage in (0, 1, 2, 3)),
        (1, {"zero_stage": 3, **moved}),
        (2, {"zero_stage": 1, "offload_optimizer": "cpu"}),
        (2, {"zero_stage": 1, "tensor": 2}),
        (2, {"zero_stage": 3, "tensor": 2}),
        (2, {"zero_stage": 2, "sequence": 2}),
        (4, {"zero_stage": 1, "tensor": 2, "sequence": 2}),
        (4, {"zero_stage": 2, "tensor": 2}),
        (4, {"zero_stage": 3, "sequence": 2}),
        (4, {"zero_stage": 3, **moved}),
    ]
    if model == "moe":
        rows += [
            (2, {"zero_stage": 1, "expert": 2}),
            (2, {"zero_stage": 3, "expert": 2}),
            (4, {"zero_stage": 2, "expert": 2, "tensor": 2}),
        ]
    return [(ranks, ParallelConfig(**keys)) for ranks, keys in rows]


def micro_batch_sizes(ranks: int, parallel: ParallelConfig) -> list[int]:
    """Every size with which the global batch divides over the ranks."""
    share = GLOBAL_BATCH // (ranks // parallel.ranks_per_sample)
    return [size for size in range(1, share + 1) if share % size == 0]


def undisturbed_setups(model: Model) -> tuple[Setup, Setup]:
    """The two layouts whose runs nobody disturbs: one rank in one piece, and two that share out every matrix or the
    experts."""
    shared = ParallelConfig(zero_stage=1, expert=2) if model == "moe" else ParallelConfig(zero_stage=1, tensor=2)
    return Setup(1, ParallelConfig(zero_stage=0), GLOBAL_BATCH, 0), Setup(2, shared, 2, 0)


def draw_plan(kills: int, seed: int, model: Model) -> tuple[list[Kill], Setup]:
    """The kills, and the layout of the attempt that nobody disturbs after them.

    A shorter plan of the same seed is the beginning of a longer one. The first kill does not fall into the start, in
    which the folder may not be a run yet and there would be nothing to resume.
    """
    choose = random.Random(f"{seed}/{model}")
    drawn = [_draw_kill(choose, model) for _ in range(kills + 1)]
    if drawn[0].moment == "starting":
        drawn[0] = replace(drawn[0], moment="training")
    return drawn[:kills], drawn[kills].setup


def _draw_kill(choose: random.Random, model: Model) -> Kill:
    ranks, parallel = choose.choice(layouts(model))
    setup = Setup(ranks, parallel, choose.choice(micro_batch_sizes(ranks, parallel)), choose.randint(1, 3))
    (target,) = choose.choices(list(TARGETS), list(TARGETS.values()))
    (moment,) = choose.choices(list(MOMENTS), list(MOMENTS.values()))
    return Kill(setup, target, moment, choose.randint(0, MOST_STEPS), choose.random(), choose.random())
