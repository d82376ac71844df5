"""What the data of a run is, in words: sources, their weights, the length of a window. No torch, no numpy, no files."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MIB = 1024 * 1024
GIB = 1024 * MIB
DEFAULT_BLOCK_BYTES = 64 * MIB
"""Of a shuffle block: what data is packed by must be what it is shuffled by."""

Packing = Literal["concatenate", "best_fit"]
"""How documents become samples: windows over all of them in a row, or bins of whole documents, padded."""


class SourceConfig(BaseModel):
    """One prepared data folder and its share of the mixture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    """What the source is called in logs and in the sample order: renaming a source reshuffles it."""
    path: str = Field(min_length=1)
    """The folder that `steppe data prepare` wrote, here or in an object store (`s3://`, `gs://`, `https://`)."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Share of the samples, relative to the other sources' weights."""
    max_epochs: int | None = Field(default=None, gt=0)
    """The source leaves the mixture when it has been read so often; the others share what it had. None: never."""


class StageConfig(BaseModel):
    """From a step or a number of tokens on: another mixture, sequence length or batch size; what is not named stays."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    from_step: int | None = Field(default=None, ge=0)
    """The stage begins after so many optimizer steps."""
    from_tokens: int | None = Field(default=None, ge=0)
    """The stage begins with the first step after so many tokens."""
    weights: dict[str, float] | None = None
    """Weight of each source by name; a source that is not named has none."""
    sequence_length: int | None = Field(default=None, gt=0)
    global_batch_size: int | None = Field(default=None, gt=0)
    """In samples; it ends a ramp, too."""

    @property
    def begin(self) -> int:
        """In steps or tokens, whichever it is given in."""
        begin = self.from_step if self.from_step is not None else self.from_tokens
        assert begin is not None
        return begin

    @model_validator(mode="after")
    def _says_when_and_what(self) -> Self:
        if (self.from_step is None) == (self.from_tokens is None):
            raise ValueError("a stage begins either from_step or from_tokens: give one of the two")
        if self.weights is None and self.sequence_length is None and self.global_batch_size is None:
            raise ValueError("a stage changes nothing: give it weights, a sequence_length or a global_batch_size")
        if self.weights == {}:
            raise ValueError("a stage has weights for no source: give at least one a weight")
        for name, weight in (self.weights or {}).items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of {name!r} is {weight}, but weights are positive: leave the source out")
        return self


class CacheConfig(BaseModel):
    """Where shards that lie elsewhere are kept on this machine while they are read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str | None = None
    """On a disk of the node's own, shared by its ranks. Sources in an object store need one."""
    max_bytes: int = Field(default=64 * GIB, gt=0)
    """Of all ranks of the node together."""
    local_sources: bool = False
    """Whether folders of a (shared) file system are read through the cache, too."""


class DataConfig(BaseModel):
    """The sources of a run, how long its windows are, and how far they are shuffled."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequence_length: int = Field(gt=0)
    """T: tokens of a sample, which feed the model; the targets are the same tokens one place on."""
    sources: tuple[SourceConfig, ...]
    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Sources are served in proportion to (weight x tokens) ** (1 / temperature); None: to weight alone."""
    packing: Packing = "concatenate"
    stages: tuple[StageConfig, ...] = ()
    """What changes later, in the order in which it does."""
    cache: CacheConfig = CacheConfig()
    shuffle_block_bytes: int = Field(default=DEFAULT_BLOCK_BYTES, gt=0)
    """Bytes of consecutive token data that are shuffled as one block, whatever the sequence length."""
    shuffle_group_blocks: int = Field(default=8, gt=0)
    """K: the samples of K blocks are shuffled among each other, so a reader works within K blocks at a time."""

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if not self.sources:
            raise ValueError("sources is empty, but a run needs at least one: add {name: NAME, path: DIR}")
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"source name {twice[0]!r} is used twice, but names must differ: rename one of them")
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        names = {source.name for source in self.sources}
        for stage in self.stages:
            for name in sorted(set(stage.weights or ()) - names):
                raise ValueError(
                    f"a stage gives weight to {name!r}, which is not among the sources ({', '.join(sorted(names))}): "
                    "add it to data.sources or take it out of the stage"
                )
        if any((stage.from_step is None) != (self.stages[0].from_step is None) for stage in self.stages):
            raise ValueError("some stages begin from_step, others from_tokens: give all of them in the same unit")
        starts = [stage.begin for stage in self.stages]
        if starts != sorted(set(starts)):
            raise ValueError(f"stages begin at {starts}, but each must begin after the one before: sort them")
        return self
