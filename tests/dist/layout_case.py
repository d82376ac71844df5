"""One layout that ranks train the small model in: a value of each axis on which runs may differ."""

import functools
from dataclasses import dataclass
from typing import Any, Literal

from pretrain.config import BatchConfig, OptimizerConfig, ParallelConfig, RunConfig
from tests.small_run import GLOBAL_BATCH, MODELS, small_config

Offload = Literal["none", "optimizer", "all"]


@dataclass(frozen=True)
class LayoutCase:
    """A layout, with what of model, data and optimizer may behave differently on different layouts.

    recompute: activation checkpointing; `alternate` is full, of every second block.
    accumulation: micro-batches of a rank in a step.
    offload: to the CPU, nothing, the optimizer's state, or parameters too.
    """

    world: Literal[1, 2, 4] = 4
    tensor: Literal[1, 2, 4] = 1
    sequence: Literal[1, 2, 4] = 1
    expert: Literal[1, 2, 4] = 1
    zero_stage: Literal[0, 1, 2, 3] = 1
    model: Literal["dense", "moe", "moebias"] = "dense"
    precision: Literal["fp32", "bf16"] = "fp32"
    num_kv_heads: Literal[1, 2, 4] = 2
    offload: Offload = "none"
    optimizer: Literal["adamw", "muon"] = "adamw"
    recompute: Literal["none", "selective", "full", "alternate"] = "none"
    accumulation: Literal[1, 2] = 2
    tied: bool = False
    document_mask: bool = False
    z_loss: bool = False
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False

    @property
    def name(self) -> str:
        """Readable, unique, and usable as a test's name."""
        words = [
            f"w{self.world}-tp{self.tensor}-sp{self.sequence}-ep{self.expert}-zero{self.zero_stage}-{self.model}",
            f"{self.precision}-kv{self.num_kv_heads}-acc{self.accumulation}-{self.optimizer}",
            *([f"recompute_{self.recompute}"] if self.recompute != "none" else []),
            *([f"offload_{self.offload}"] if self.offload != "none" else []),
            *(word for word in ("tied", "document_mask", "z_loss", "compile") if getattr(self, word)),
            *([f"reduce_{self.reduce_dtype}"] if self.reduce_dtype != "fp32" else []),
        ]
        return "-".join(words)

    @property
    def config(self) -> RunConfig:
        """The run. Raises ValueError if no number of ranks can do it."""
        share = self.accumulation * max(1, self.world // (self.tensor * self.sequence))
        micro_batch_size = max(1, GLOBAL_BATCH // share)
        return RunConfig(
            **_base(self.model, self.num_kv_heads, self.tied, self.document_mask),
            batch=BatchConfig(global_batch_size=GLOBAL_BATCH, micro_batch_size=micro_batch_size),
            optimizer=_optimizer(self.optimizer, self.z_loss),
            precision=self.precision,
            parallel=_parallel(
                zero_stage=self.zero_stage,
                tensor=self.tensor,
                sequence=self.sequence,
                expert=self.expert,
                activation_checkpointing="full" if self.recompute == "alternate" else self.recompute,
                activation_checkpointing_every=2 if self.recompute == "alternate" else 1,
                offload_optimizer="none" if self.offload == "none" else "cpu",
                offload_parameters="cpu" if self.offload == "all" else "none",
                reduce_dtype=self.reduce_dtype,
                compile=self.compile,
            ),
        )

    @property
    def oracle(self) -> "LayoutCase":
        """The same mathematics on one rank, for the oracle to do; equal for all layouts that must agree."""
        keep = ("model", "precision", "num_kv_heads", "optimizer", "tied", "document_mask", "z_loss")
        return LayoutCase(world=1, accumulation=1, **{name: getattr(self, name) for name in keep})


@functools.cache
def _base(model: str, num_kv_heads: int, tied: bool, document_mask: bool) -> dict[str, Any]:
    # Sections are frozen, so that those of one run may serve in another; `layouts.py` looks at tens of thousands.
    config = small_config(
        f"model={{num_kv_heads: {num_kv_heads}, tie_embeddings: {tied}, document_mask: {document_mask}}}",
        f"model={{moe: {MODELS[model]}, qk_norm: {model == 'moe'}}}",
    )
    return {key: getattr(config, key) for key in ("name", "model", "data", "schedule")}


@functools.cache
def _optimizer(name: Literal["adamw", "muon"], z_loss: bool) -> OptimizerConfig:
    # An eps above rounding's noise (1e-10 on gradients of 1e-3, clipped): with 1e-8 the sign of that noise would be the
    # update of the few elements whose gradient is smaller still, and weights could not be compared one by one.
    return OptimizerConfig(name=name, lr=3e-3, eps=1e-6, grad_clip=0.1, z_loss=1e-2 if z_loss else 0.0)


_parallel = functools.cache(ParallelConfig)
