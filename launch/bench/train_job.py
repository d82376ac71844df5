"""What a contender of `steppe bench train` is told when it starts. No torch here."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pretrain.config import RunConfig


class Job(BaseModel):
    """The work, the same for all.

    config: one micro-batch a step and a rank, in bf16.
    keep_memory: whether peers, too, keep the memory that they free; Steppe always does.
    nanogpt: a clone of it.
    """

    model_config = ConfigDict(frozen=True)

    config: RunConfig
    keep_memory: bool = False
    nanogpt: Path | None = None
