"""What a rank that cannot go on says of it, for the launcher to read: `logs/rank_00000.error.json`."""

import errno
from pathlib import Path

from pretrain.config import RunConfig
from pretrain.outcome import exit_code_of
from pretrain.recipe import load_config
from pretrain.run_dir import RunDir, write_json

# The type of an error that means that memory ran out, whichever of many classes it was raised as.
OUT_OF_MEMORY = "OutOfMemory"
# How torch's allocators, CUDA, NCCL and cuBLAS say so.
SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "cublas_status_alloc_failed")


def write_rank_error(run_dir: RunDir, rank: int, error: Exception) -> None:
    """Write {exit_code, type, message}, unless the rank's watchdog has written already: what a rank that hung says when
    the others are gone is not the cause."""
    if run_dir.rank_error(rank).exists():
        return
    kind, message = type(error).__name__, str(error)
    if is_out_of_memory(error):
        kind, message = OUT_OF_MEMORY, f"{first_sentences(message or kind)}{hint_at(run_dir.config_path)}"
    write_json(run_dir.rank_error(rank), {"exit_code": exit_code_of(error), "type": kind, "message": message})


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, a device's or the machine's. torch's own class for it is only one of several."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in said for sign in SIGNS))


def first_sentences(message: str) -> str:
    """What was wanted and what there was: the rest of torch's message is about its allocator's settings."""
    sentences = " ".join(message.split()).split(". ")
    return ". ".join(sentences[:3]).rstrip(".")


def hint_at(config_path: Path) -> str:
    """What may be changed for memory, with the values in use; nothing where the config cannot be read."""
    try:
        return f"; {memory_hint(load_config(config_path))}"
    except (ValueError, OSError):
        return ""


def memory_hint(config: RunConfig) -> str:
    """The keys that need less memory with another value, the cheapest change first, and their values."""
    batch, parallel = config.batch, config.parallel
    keys = []
    if parallel.zero_stage < 3:
        keys.append(f"a higher parallel.zero_stage (now {parallel.zero_stage})")
    if parallel.activation_checkpointing != "full":
        keys.append(f"parallel.activation_checkpointing=full (now {parallel.activation_checkpointing})")
    if batch.micro_batch_size > 1:
        keys.append(f"a smaller batch.micro_batch_size (now {batch.micro_batch_size})")
    keys.append("more ranks, or a higher parallel.tensor")
    return f"`steppe plan` says what a rank needs; less with {', '.join(keys)}"
