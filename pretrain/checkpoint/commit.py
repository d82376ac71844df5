"""What makes a folder of files a checkpoint: its index, and then its name."""

import os
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path

from torch import Tensor

from data_pipeline.tokenizer_files import TokenizerFiles
from model.config import ModelConfig
from model.parameters import buffer_shapes, parameter_shapes
from pretrain.boxes import Box
from pretrain.checkpoint.folder import replaced_name
from pretrain.checkpoint.index import (
    CheckpointIndex,
    packed_boxes,
    rank_file_name,
    stored_parameters,
    write_index,
)
from pretrain.checkpoint.rank_file import BLOCK_BYTES, tensor_key, write_rank_file
from pretrain.run_dir import sync_folder


def copy_tokenizer(tokenizer: Path | None, folder: Path) -> str | None:
    """Copy the tokenizer into a new folder; returns its fingerprint. That the folder lists it on the disk is left to
    `commit`."""
    if tokenizer is None:
        return None
    tokenizer.stat()  # an OSError where the run's copy is gone: once it is back, a save succeeds
    files = TokenizerFiles.read(tokenizer)
    for name, content in files.contents.items():
        with open(folder / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    return files.fingerprint


def commit(scratch: Path, final: Path, index: CheckpointIndex) -> None:
    """Give a folder its index and then its name: from here on it is a checkpoint, whatever happens."""
    check_complete(index)
    write_index(scratch, index)  # and fsyncs the folder, with all that is in it
    if final.exists():  # a step that a resumed run makes again
        os.replace(final, replaced_name(final))
    os.replace(scratch, final)
    sync_folder(final.parent)
    shutil.rmtree(replaced_name(final), ignore_errors=True)


def check_complete(index: CheckpointIndex) -> None:
    """Assert that each value of the model is in exactly one box: what cannot be loaded must not be a checkpoint.

    That boxes of the right volume do not overlap is left to `pretrain/boxes.py`, whose cuts never do.
    """
    shapes = {**parameter_shapes(index.model), **buffer_shapes(index.model)}
    stored = {name: parameter.shape for name, parameter in index.parameters.items()}
    assert stored == shapes, f"not of the model: {sorted(stored.items() ^ shapes.items())[:3]}"
    for name, parameter in index.parameters.items():
        held = int(parameter.sizes.prod(axis=1).sum())
        assert held == prod(shapes[name]), f"{name}: {held} values in boxes, of {prod(shapes[name])}"


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
            parameters=stored_parameters(
                [packed_boxes(0, ((name, shape, boxes[name]) for name, shape in shapes.items()))]
            ),
        )
        commit(scratch, checkpoint, index)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
