"""What the data of a run is, in words: sources, their weights, the length of a window. No torch, no numpy, no files."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

MIB = 1024 * 1024


class SourceConfig(BaseModel):
    """One prepared data folder and its share of the mixture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    """What the source is called in logs and in the sample order: renaming a source reshuffles it."""
    path: str = Field(min_length=1)
    """The folder that `steppe data prepare` wrote."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Share of the samples, relative to the other sources' weights."""


class DataConfig(BaseModel):
    """The sources of a run, how long its windows are, and how far they are shuffled."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequence_length: int = Field(gt=0)
    """T: tokens that a window feeds to the model; the targets are the same tokens one place on."""
    sources: tuple[SourceConfig, ...]
    shuffle_block_bytes: int = Field(default=64 * MIB, gt=0)
    """Bytes of consecutive token data that are shuffled as one block."""
    shuffle_group_blocks: int = Field(default=8, gt=0)
    """K: the windows of K blocks are shuffled among each other, so a reader works within K blocks at a time."""

    @model_validator(mode="after")
    def _check_sources(self) -> "DataConfig":
        if not self.sources:
            raise ValueError("sources is empty, but a run needs at least one: add {name: NAME, path: DIR}")
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"source name {twice[0]!r} is used twice, but names must differ: rename one of them")
        return self
