"""What `--step` says: which of a run's checkpoints is meant."""

from typing import Literal

HELP = "Of a run, the checkpoint of this step, or `best` (of the lowest validation loss); default: the newest."


def step_of_word(word: str | None, option: str = "--step") -> int | Literal["best"] | None:
    """Raises ValueError if it is neither a number of steps nor `best`."""
    if word is None:
        return None
    if word == "best":
        return "best"
    if not (word.isascii() and word.isdecimal()):
        raise ValueError(f"{option} {word} must be a number of steps, or best for that of the lowest validation loss")
    return int(word)
