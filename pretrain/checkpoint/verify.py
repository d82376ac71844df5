"""Is a checkpoint still what was written? Reads every byte of it; and what it holds, from its index alone."""

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from pretrain.checkpoint.index import CheckpointIndex, DamagedError, OtherVersionError, rank_file_name, read_index
from pretrain.checkpoint.rank_file import READ_BYTES, RankFile


def verify_checkpoint(checkpoint: Path, advance: Callable[[int], None] = lambda count: None) -> list[str]:
    """What is damaged: nothing, or the first fault of each file. `advance` is told of bytes that have been read."""
    try:
        index = read_index(checkpoint)
    except (DamagedError, OtherVersionError, OSError) as error:
        return [str(error)]
    damages = []
    for rank, stored in enumerate(index.files):
        try:
            file = RankFile(checkpoint / rank_file_name(rank), stored, index.block_bytes)
            try:
                for start in range(0, file.value_bytes, READ_BYTES):
                    stop = min(start + READ_BYTES, file.value_bytes)
                    file.read(start, stop)
                    advance(stop - start)
            finally:
                file.close()
        except (DamagedError, OSError) as error:
            damages.append(str(error))
    return damages


def describe(index: CheckpointIndex) -> dict[str, Any]:
    """What a checkpoint is of, as JSON values: the run's place, the model, and the layout that saved it."""
    config, trainer = index.config, index.trainer
    shapes = {name: stored.shape for name, stored in index.parameters.items()}
    return {
        "step": index.step,
        "tokens": None if trainer is None else trainer["tokens"],
        "position": None if trainer is None else trainer["position"],
        "name": None if config is None else config.name,
        "precision": None if config is None else config.precision,
        "optimizer": None if config is None else config.optimizer.name,
        "parallel": None if config is None else config.parallel.model_dump(mode="json"),
        "ranks": len(index.files),
        "size_bytes": index.size_bytes,
        "sequence_length": index.sequence_length,
        "tokenizer_fingerprint": index.tokenizer_fingerprint,
        "values": sum(prod(shape) for shape in shapes.values()),
        "model": index.model.model_dump(mode="json"),
        "engine": index.engine,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "boxes": sum(len(stored.table) for stored in index.parameters.values()),
    }
