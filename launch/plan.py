"""What a run needs, before anyone queues for it: size, length, layout, memory of a rank, and a layout that fits."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, get_args

from launch.gpus import Gpu
from model.accounting import flops_per_token, parameter_counts
from pretrain.config import Recompute, RunConfig
from pretrain.data_plan import end_place, timeline
from pretrain.data_stages import Place
from pretrain.layout import Layout, batch_sizes, micro_batches
from pretrain.memory import RankMemory, moments, rank_memory
from pretrain.recipe import apply_overrides, validated

FLOPS_CONVENTION = (
    "6 for each parameter of a matrix product that a token uses, and 12 L H h T for attention, not halved for "
    "causality; recomputation does not count (PaLM, appendix B)"
)


@dataclass(frozen=True)
class Alternative:
    """A layout that fits: `--set` words that turn the recipe's into it, and a rank's memory then."""

    overrides: list[str]
    memory: RankMemory


@dataclass(frozen=True)
class Plan:
    """What `steppe plan` says. `batches`: (sequences, micro-batches of a rank) of each size of the batch ramp."""

    config: RunConfig
    layout: Layout
    nodes: int
    gpus_per_node: int
    gpu: Gpu
    parameters: dict[str, int]
    flops_per_token: int
    steps: int
    tokens: int
    batches: list[tuple[int, int]]
    moments: list[RankMemory]
    nearest: Alternative | None

    @property
    def memory(self) -> RankMemory:
        """A rank's, when it is fullest."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def flops(self) -> int:
        """Of the whole run."""
        return self.flops_per_token * self.tokens

    @property
    def fits(self) -> bool:
        """Whether a rank's memory leaves the headroom free."""
        return self.memory.total <= self.gpu.usable_bytes

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        length = self.config.data.sequence_length
        return {
            "name": self.config.name,
            "nodes": self.nodes,
            "gpus_per_node": self.gpus_per_node,
            "gpu": {**asdict(self.gpu), "headroom_bytes": self.gpu.headroom_bytes},
            "parameters": self.parameters,
            "flops_per_token": self.flops_per_token,
            "flops_convention": FLOPS_CONVENTION,
            "steps": self.steps,
            "tokens": self.tokens,
            "flops": self.flops,
            "batches": [
                {"sequences": size, "tokens": size * length, "micro_batches": count} for size, count in self.batches
            ],
            "layout": {
                "ranks": self.layout.world,
                "data": self.layout.data,
                "micro_batch_size": self.config.batch.micro_batch_size,
                "precision": self.config.precision,
                **self.config.parallel.model_dump(mode="json"),
            },
            "memory": _memory_dict(self.memory),
            "moments": [_memory_dict(moment) for moment in self.moments],
            "fits": self.fits,
            "nearest": self.nearest and {"set": self.nearest.overrides, "memory": _memory_dict(self.nearest.memory)},
        }


def make_plan(config: RunConfig, nodes: int, gpus_per_node: int, gpu: Gpu) -> Plan:
    """Raises ValueError with the remedy if the recipe's layout is impossible on so many GPUs."""
    for flag, number in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node)):
        if number < 1:
            raise ValueError(f"{flag} {number}: give a number of 1 or more")
    world = nodes * gpus_per_node
    layout = Layout.of(config, world)
    steps, tokens = run_length(config)
    return Plan(
        config=config,
        layout=layout,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        parameters=parameter_counts(config.model),
        flops_per_token=flops_per_token(config.model, config.data.sequence_length),
        steps=steps,
        tokens=tokens,
        batches=[(size, micro_batches(config, size, layout.data)) for size in batch_sizes(config)],
        moments=moments(config, world),
        nearest=nearest_fit(config, nodes, gpus_per_node, gpu),
    )


def run_length(config: RunConfig) -> tuple[int, int]:
    """(steps, tokens) of the whole run: one is what the schedule says, the other follows by its batches."""
    unmixed = config.model_copy(update={"data": config.data.model_copy(update={"temperature": None})})
    end = end_place(timeline(unmixed, [], Place(), (), {}), (), config.schedule)
    return end.step, end.tokens


def nearest_fit(config: RunConfig, nodes: int, gpus_per_node: int, gpu: Gpu) -> Alternative | None:
    """The layout that fits and is cheapest to change to: without changes if the recipe's fits, None if none does.

    Tried in the order of what a change costs: a higher ZeRO stage, selective and full activation checkpointing, smaller
    micro-batches, more tensor parallelism up to the GPUs of a node, more sequence and then expert parallelism. All
    combinations of cheaper changes come before a dearer one. What a change does not help is not changed.
    """
    world = nodes * gpus_per_node
    for overrides in _changes(config, gpus_per_node, world):
        try:
            changed = validated(apply_overrides(config.model_dump(mode="json"), overrides)) if overrides else config
            memory = rank_memory(changed, world)
        except ValueError:
            continue  # impossible, and so no way out
        if memory.total <= gpu.usable_bytes:
            return Alternative(overrides, memory)
    return None


def _changes(config: RunConfig, gpus_per_node: int, world: int) -> Iterator[list[str]]:
    """`--set` words of every layout that is reached by raising what saves memory, the cheapest first."""
    parallel, modes = config.parallel, get_args(Recompute)
    experts = config.model.moe.experts if config.model.moe is not None else 1
    # The dearest first: the last of a product turns fastest.
    values: dict[str, list[Any]] = {
        "parallel.expert": _doubled(parallel.expert, min(experts, world)),
        "parallel.sequence": _doubled(parallel.sequence, min(config.model.num_heads, world)),
        "parallel.tensor": _doubled(parallel.tensor, gpus_per_node),
        "batch.micro_batch_size": _halved(config.batch.micro_batch_size),
        "parallel.activation_checkpointing": list(modes[modes.index(parallel.activation_checkpointing) :]),
        "parallel.zero_stage": list(range(parallel.zero_stage, 4)),
    }
    for choice in product(*values.values()):
        yield [
            f"{key}={value}"
            for (key, options), value in reversed(list(zip(values.items(), choice, strict=True)))
            if value != options[0]
        ]


def _doubled(start: int, limit: int) -> list[int]:
    """start, twice that and so on, while not above the limit; start in any case."""
    return [start] + [start << n for n in range(1, limit.bit_length()) if start << n <= limit]


def _halved(start: int) -> list[int]:
    """start, half of it and so on, while whole; at last 1."""
    sizes = [start]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    return sizes if sizes[-1] == 1 else [*sizes, 1]


def _memory_dict(memory: RankMemory) -> dict[str, Any]:
    return {**asdict(memory), "total": memory.total}
