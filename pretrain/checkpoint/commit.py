"""What makes a folder of files a checkpoint: its index, and then its name."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from model.config import ModelConfig
from model.parameters import buffer_shapes, parameter_shapes
from pretrain.boxes import Box
from pretrain.checkpoint.folder import replaced_name
from pretrain.checkpoint.index import (
    TOKENIZER_NAME,
    CheckpointIndex,
    boxes_of,
    fingerprint_of,
    rank_file_name,
    stored_parameters,
    write_index,
)
from pretrain.checkpoint.rank_file import BLOCK_BYTES, tensor_key, write_rank_file
from pretrain.run_dir import sync_folder


def copy_tokenizer(tokenizer: Path | None, folder: Path) -> str | None:
    """Copy the tokenizer's file durably; returns its fingerprint."""
    if tokenizer is None:
        return None
    copy = folder / TOKENIZER_NAME
    shutil.copyfile(tokenizer, copy)
    with open(copy, "rb+") as file:
        os.fsync(file.fileno())
    return fingerprint_of(copy)


def commit(scratch: Path, final: Path, index: CheckpointIndex) -> None:
    """Give a folder its index and then its name: from here on it is a checkpoint, whatever happens."""
    write_index(scratch, index)
    sync_folder(scratch)
    if final.exists():  # a step that a resumed run makes again
        os.replace(final, replaced_name(final))
    os.replace(scratch, final)
    sync_folder(final.parent)
    shutil.rmtree(replaced_name(final), ignore_errors=True)


def write_weights(
    checkpoint: Path,
    model: ModelConfig,
    sequence_length: int,
    tokenizer: Path | None,
    tensors: Callable[[str], Tensor],
) -> None:
    """Write a checkpoint of weights alone, in one file: what a run can start from, or be evaluated by.

    tensors: called for each parameter and buffer by logical name, in the decoder's order, for its fp32 values; one at
    a time is held. Raises OSError where it cannot be written.
    """
    shapes = {**parameter_shapes(model), **buffer_shapes(model)}
    boxes = {name: Box((0,) * len(shape), shape) for name, shape in shapes.items()}
    scratch = checkpoint.with_name(checkpoint.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    entries = [(tensor_key("fp32", name, boxes[name]), shape) for name, shape in shapes.items()]
    try:
        stored = write_rank_file(scratch / rank_file_name(0), entries, (tensors(name) for name in shapes))
        index = CheckpointIndex(
            step=0,
            model=model,
            sequence_length=sequence_length,
            tokenizer_fingerprint=copy_tokenizer(tokenizer, scratch),
            block_bytes=BLOCK_BYTES,
            files=[stored],
            parameters=stored_parameters([boxes_of(0, ((name, shape, boxes[name]) for name, shape in shapes.items()))]),
        )
        commit(scratch, checkpoint, index)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
