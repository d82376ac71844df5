"""The config tree of a run: frozen, strict, with units in every docstring. Free of torch: a login node can read it.

Derived numbers are functions of the tree (`micro_batches`, `total_tokens`), never fields. How YAML and `--set` become a
tree, and how a broken rule is worded, is `pretrain/recipe.py`.
"""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from data_pipeline.config import DataConfig, SourceConfig
from model.config import ModelConfig
from pretrain.health_config import HealthConfig, SkipsConfig
from pretrain.section import Section

# What activation checkpointing recomputes; `pretrain/activation_checkpointing.py` says what that is.
Recompute = Literal["none", "selective", "full"]


class BatchConfig(Section):
    """Batch sizes, in sequences of `data.sequence_length` tokens.

    `global_batch_size` is one optimizer step over all ranks, `micro_batch_size` one forward of one rank; what lies
    between is gradient accumulation. `ramp` is a list of (tokens, size): until that many tokens are consumed the global
    batch has that size, afterwards the next entry's, at last `global_batch_size`.
    """

    global_batch_size: int = Field(gt=0)
    micro_batch_size: int = Field(gt=0)
    ramp: tuple[tuple[int, int], ...] = ()

    @model_validator(mode="after")
    def _ramp_rises(self) -> Self:
        ends = [tokens for tokens, _ in self.ramp]
        if any(tokens <= 0 or size <= 0 for tokens, size in self.ramp) or ends != sorted(set(ends)):
            raise ValueError(f"ramp={list(self.ramp)} must be (tokens, size) pairs, positive, tokens strictly rising")
        return self


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019, decoupled decay), or Muon for the blocks' matrices and AdamW for the rest.

    Norms and embeddings are spared from `weight_decay`. Muon's updates are scaled to AdamW's size (see
    `pretrain/muon.py`), so that both take the same `lr`; `momentum` is Muon's alone.

    `grad_clip` bounds the global L2 norm of the gradient (0: off). `z_loss` weighs the mean of log^2 Z over the
    vocabulary (PaLM, section 5); it enters the gradient, never the reported loss.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0, allow_inf_nan=False)
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    grad_clip: float = Field(default=1.0, ge=0)
    z_loss: float = Field(default=0.0, ge=0)

    @field_validator("betas")
    @classmethod
    def _betas_below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={list(betas)} must lie in [0, 1)")
        return betas


class ScheduleConfig(Section):
    """Learning rate over the run; each length is given in optimizer steps or in tokens, all in the same unit.

    `cosine` and `linear` fall from the end of warm-up to the end of the run, `wsd` (warm-up, stable, decay) falls
    linearly over the last `decay_steps`, each to `min_lr_ratio` times `optimizer.lr`; `constant` does not fall.
    """

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int | None = Field(default=None, ge=0)
    warmup_tokens: int | None = Field(default=None, ge=0)
    total_steps: int | None = Field(default=None, gt=0)
    total_tokens: int | None = Field(default=None, gt=0)
    decay_steps: int | None = Field(default=None, gt=0)
    decay_tokens: int | None = Field(default=None, gt=0)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        unit, other = ("tokens", "steps") if self.total_tokens is not None else ("steps", "tokens")
        strays = [key for key in ("warmup", "decay", "total") if getattr(self, f"{key}_{other}") is not None]
        if strays:
            raise ValueError(
                f"{strays[0]}_{other} does not go with total_{unit}: give every length in the same unit, "
                f"{strays[0]}_{unit} here, and take the other away with {strays[0]}_{other}: null"
            )
        if self.total is None:
            raise ValueError("total_steps is missing: give total_steps or total_tokens")
        if (self.name == "wsd") != (self.decay is not None):
            raise ValueError(
                f"name={self.name} {'needs' if self.name == 'wsd' else 'takes no'} decay_{unit}: "
                "only wsd has a decay of stated length"
            )
        if self.warmup + (self.decay or 0) > self.total:
            raise ValueError(
                f"warmup_{unit}={self.warmup} and decay_{unit}={self.decay or 0} do not fit into "
                f"total_{unit}={self.total}: shorten them or train longer"
            )
        return self

    @property
    def counts_tokens(self) -> bool:
        """Whether the lengths are in tokens rather than in steps."""
        return self.total_tokens is not None

    @property
    def total(self) -> int:
        """Length of the run, in the schedule's unit."""
        return self.total_tokens if self.counts_tokens else self.total_steps  # type: ignore[return-value]

    @property
    def warmup(self) -> int:
        """Length of the warm-up, in the schedule's unit."""
        return (self.warmup_tokens if self.counts_tokens else self.warmup_steps) or 0

    @property
    def decay(self) -> int | None:
        """Length of wsd's final decay, in the schedule's unit."""
        return self.decay_tokens if self.counts_tokens else self.decay_steps


class ParallelConfig(Section):
    """How the same model is laid out over ranks. Nothing here changes what is learned, but for `reduce_dtype`.

    zero_stage: what data-parallel ranks share out: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too.
    tensor: ranks that split every matrix, the vocabulary and, between the matrices, the sequence.
    sequence: ranks that split a sequence, and attention by heads (Ulysses).
    expert: ranks that split the experts of each mixture-of-experts layer. They are the data-parallel ranks (and their
        tensor and sequence parallel ones) over again, so this degree multiplies no others.
    activation_checkpointing: what backward recomputes; `pretrain/activation_checkpointing.py` lists what is kept.
        It applies to every `activation_checkpointing_every`-th block.
    offload_optimizer, offload_parameters: where masters and optimizer state, and parameters, wait between uses.
    reduce_dtype: of gradients on their way between ranks; they are accumulated in fp32 in any case.
    compile: each block by torch.compile.
    """

    zero_stage: Literal[0, 1, 2, 3] = 1
    tensor: int = Field(default=1, gt=0)
    sequence: int = Field(default=1, gt=0)
    expert: int = Field(default=1, gt=0)
    activation_checkpointing: Recompute = "none"
    activation_checkpointing_every: int = Field(default=1, gt=0)
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_parameters: Literal["none", "cpu"] = "none"
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False

    @property
    def ranks_per_sample(self) -> int:
        """Ranks that work on the same sequences: the data-parallel degree is the world divided by it."""
        return self.tensor * self.sequence

    @model_validator(mode="after")
    def _offload_has_what_it_moves(self) -> Self:
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError(
                f"offload_optimizer={self.offload_optimizer} needs zero_stage 1 or higher: at stage 0 DeepSpeed does "
                "not hold the optimizer's state; set zero_stage to 1"
            )
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise ValueError(
                f"offload_parameters={self.offload_parameters} needs zero_stage=3, the only one that shards "
                f"parameters, not {self.zero_stage}: set zero_stage to 3, or offload_parameters to none"
            )
        return self


class CheckpointConfig(Section):
    """A checkpoint every so many optimizer steps (0: only at the end), and which of them stay.

    keep: the newest so many. keep_every_steps: for good, those of steps that it divides (0: none). keep_best: the one
    with the lowest validation loss, as the mean over the sources.
    asynchronous: training goes on while a checkpoint is written, at the price of a copy of the rank's masters and
    optimizer state in host memory.
    """

    every_steps: int = Field(default=1000, ge=0)
    keep: int = Field(default=2, gt=0)
    keep_every_steps: int = Field(default=0, ge=0)
    keep_best: bool = False
    asynchronous: bool = True

    @model_validator(mode="after")
    def _kept_ones_are_made(self) -> Self:
        if self.keep_every_steps and (not self.every_steps or self.keep_every_steps % self.every_steps):
            raise ValueError(
                f"keep_every_steps={self.keep_every_steps} is no multiple of every_steps={self.every_steps}, and so "
                "asks for checkpoints that are not made: choose a multiple, or 0"
            )
        return self


class EvaluationConfig(Section):
    """Validation in the loop, every so many optimizer steps (0: never).

    windows: times data.sequence_length, how many targets of each source are scored: those of its first documents.
    """

    every_steps: int = Field(default=0, ge=0)
    sources: tuple[SourceConfig, ...] = ()
    windows: int = Field(default=256, gt=0)

    @model_validator(mode="after")
    def _sources_when_asked(self) -> Self:
        if self.every_steps and not self.sources:
            raise ValueError(
                f"every_steps={self.every_steps} asks for validation but sources is empty: name a held-out source, "
                "or set every_steps to 0"
            )
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"sources: names must be unique, got {names}")
        return self


class RunConfig(Section):
    """Everything that decides what a run learns and how it is laid out.

    `precision` is the dtype of forward and backward: the masters and the optimizer's state are fp32 in each.
    `deterministic`: the same run on the same devices in the same layout gives the same bits on GPUs too, where it costs
    some speed; on processors it does in any case.
    `init_from`: weights to start from instead of the seed's: a run, one of its checkpoints, or an imported one.
    `deepspeed` is merged into DeepSpeed's derived configuration last, and cannot contradict what the recipe says.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    seed: int = Field(default=0, ge=0, lt=2**63)
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    deterministic: bool = False
    init_from: str | None = None
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    health: HealthConfig = HealthConfig()
    skips: SkipsConfig = SkipsConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _precision_has_masters(self) -> Self:
        if self.precision != "fp32" and self.parallel.zero_stage == 0:
            raise ValueError(
                f"precision={self.precision} does not go with parallel.zero_stage=0, where DeepSpeed applies a step of "
                "weight decay before training: set parallel.zero_stage to 1, which costs nothing on one rank"
            )
        return self

    @model_validator(mode="after")
    def _best_is_known(self) -> Self:
        checkpoints, validation = self.checkpoint.every_steps, self.evaluation.every_steps
        if self.checkpoint.keep_best and (not checkpoints or not validation or checkpoints % validation):
            raise ValueError(
                f"checkpoint.keep_best=true needs a validation at every checkpoint, but checkpoint.every_steps="
                f"{checkpoints} is no multiple of evaluation.every_steps={validation}: make it one, or set "
                "checkpoint.keep_best to false"
            )
        return self

    @model_validator(mode="after")
    def _routers_stay_fp32(self) -> Self:
        if self.model.moe is not None and self.parallel.zero_stage == 3 and self.precision == "fp16":
            raise ValueError(
                "precision=fp16 with model.moe does not go with parallel.zero_stage=3: routers stay fp32, beside "
                "DeepSpeed's stage 3, which would scale losses without them; use bf16, or set parallel.zero_stage to 2"
            )
        return self

    @model_validator(mode="after")
    def _muon_has_whole_matrices(self) -> Self:
        if self.optimizer.name == "muon" and self.parallel.zero_stage == 3:
            raise ValueError(
                "optimizer.name=muon does not go with parallel.zero_stage=3, which updates the parts of a matrix at "
                "different times: set parallel.zero_stage to 2, or use adamw"
            )
        if self.optimizer.name == "muon" and self.parallel.offload_optimizer != "none":
            raise ValueError(
                f"optimizer.name=muon does not go with parallel.offload_optimizer={self.parallel.offload_optimizer}, "
                "as its matrix products would run on the CPU: set parallel.offload_optimizer to none, or use adamw"
            )
        return self
