"""What every section of a config is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of the tree: immutable, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
