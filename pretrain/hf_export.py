"""From a checkpoint to a Hugging Face folder: sharded safetensors, config and tokenizer, for transformers as it is.

The shards are planned from shapes alone and written front to back, so that memory holds one parameter at a time,
whatever the size of a shard. All is written into `OUT.tmp`, which becomes OUT when transformers' logits have been found
equal to ours.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_files import tokenizer_in
from model.config import ModelConfig
from model.parameters import keeps_fp32, parameter_shapes
from pretrain.checkpoint.index import DamagedError
from pretrain.checkpoint.read import CheckpointReader
from pretrain.choose_checkpoint import Step, checkpoint_of
from pretrain.hf import config_to_hf
from pretrain.hf_check import compare_logits
from pretrain.hf_folder import INDEX_NAME, SINGLE_NAME
from pretrain.hf_tokenizer import check_fast_tokenizer, write_fast_tokenizer
from pretrain.hf_weights import parameter_to_hf, stored_shapes
from pretrain.run_dir import sync_folder, write_json
from pretrain.safetensors_header import Entry, safetensors_header

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_SHARD_BYTES = 5_000_000_000
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # as safetensors has them

Progress = Callable[[str, int, int], None]
"""Told the stage (`writing`, `comparing`), how much of it is done and of how much."""


@dataclass(frozen=True)
class Shard:
    """A file to write: its name, and of each tensor, in the order of the file, shape and dtype."""

    file: str
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(*tensor) for tensor in self.tensors.values())

    @property
    def entries(self) -> list[Entry]:
        return [Entry(name, _NAMES[t], shape, _nbytes(shape, t)) for name, (shape, t) in self.tensors.items()]


def export(
    target: Path,
    out: Path,
    step: Step = None,
    dtype: str = "fp32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    with_tokenizer: bool = True,
    memory_bytes: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Export a run (its newest checkpoint, or that of `step`) or a checkpoint; returns what `--json` prints.

    dtype: of the stored weights: `fp32` is exact, `bf16` rounds all but the routers. max_shard_bytes: of a file's
    tensors; a larger tensor has a file of its own. memory_bytes: what the comparison may use, see `compare_logits`.
    Raises FileExistsError if `out` exists; ValueError for a model that transformers has no counterpart of, or a
    tokenizer that cannot be a fast one; RuntimeError if the result is not the same function. `out` does not come to be
    then.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another --out, or remove it")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: a model is exported in {' or '.join(DTYPES)}")
    if max_shard_bytes < 1:
        raise ValueError(f"--max-shard-size {max_shard_bytes}: give a size of 1 byte or more")
    problems: list[Exception] = []
    with CheckpointReader(checkpoint_of(target, step, problems)) as reader:
        config, context_length, rounded = reader.index.model, reader.index.sequence_length, DTYPES[dtype]
        hf = config_to_hf(config, context_length, rounded)
        shards = plan_shards(config, rounded, max_shard_bytes)
        has_tokenizer = with_tokenizer and reader.index.tokenizer_fingerprint is not None
        tokenizer = Tokenizer(tokenizer_in(reader.checkpoint)) if has_tokenizer else None
        scratch = out.with_name(out.name + ".tmp")
        if scratch.exists():  # of an export that was killed
            shutil.rmtree(scratch)
        scratch.mkdir(parents=True)
        try:
            _write_config(scratch, hf, tokenizer, context_length)
            write_shards(scratch, shards, config, rounded, reader.tensor, progress)
            if tokenizer is not None:
                check_fast_tokenizer(scratch)
            comparison = compare_logits(
                scratch,
                config,
                lambda name: reader.tensor(name).to(_stored_dtype(name, rounded)).float(),
                _special_ids(tokenizer, config),
                memory_bytes,
                lambda done, total: progress("comparing", done, total),
            )
            _publish(scratch, out)
        except DamagedError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise DamagedError(f"{error}; export an older checkpoint of the run, with --step") from None
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        return {
            "path": str(out),
            "model": str(target),
            "step": reader.index.step,
            "passed_over": [str(problem) for problem in problems],
            "architecture": hf["architectures"][0],
            "dtype": dtype,
            "parameters": sum(math.prod(shape) for shard in shards for shape, _ in shard.tensors.values()),
            "bytes": sum(shard.nbytes for shard in shards),
            "shards": len(shards),
            "tokenizer": tokenizer is not None,
            "comparison": asdict(comparison),
        }


def plan_shards(config: ModelConfig, dtype: torch.dtype, max_shard_bytes: int) -> list[Shard]:
    """What goes into which file: tensors in the decoder's order, a new file where the next one would not fit."""
    contents: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    held = 0
    for name, shape in parameter_shapes(config).items():
        for stored, of_one in stored_shapes(name, shape, config).items():
            tensor = (of_one, _stored_dtype(name, dtype))
            if contents[-1] and held + _nbytes(*tensor) > max_shard_bytes:
                contents.append({})
                held = 0
            contents[-1][stored] = tensor
            held += _nbytes(*tensor)
    count = len(contents)
    names = [f"model-{at:05d}-of-{count:05d}.safetensors" for at in range(1, count + 1)] if count > 1 else [SINGLE_NAME]
    return [Shard(name, tensors) for name, tensors in zip(names, contents, strict=True)]


def write_shards(
    folder: Path,
    shards: list[Shard],
    config: ModelConfig,
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
    progress: Progress = lambda stage, done, total: None,
) -> None:
    """Write the files, and an index where there are several. Each parameter is read once, and dropped for the next."""
    pending = _stored_tensors(config, dtype, read)
    done, total = 0, sum(shard.nbytes for shard in shards)
    for shard in shards:
        try:
            with open(folder / shard.file, "wb") as file:
                file.write(safetensors_header(shard.entries, {"format": "pt"}))
                for expected, planned in shard.tensors.items():
                    _write_tensor(file, expected, planned, *next(pending))
                    done += _nbytes(*planned)
                    progress("writing", done, total)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # such as that of a full disk, which names no file
            raise OSError(error.errno, error.strerror, error.filename or str(folder / shard.file)) from error
    if len(shards) > 1:
        weight_map = {name: shard.file for shard in shards for name in shard.tensors}
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _stored_tensors(
    config: ModelConfig, dtype: torch.dtype, read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for name in parameter_shapes(config):
        as_stored = _stored_dtype(name, dtype)
        # Without a name of its own here, so that nothing keeps it while the next is read.
        yield from (
            (their, tensor.to(as_stored)) for their, tensor in parameter_to_hf(name, read(name), config).items()
        )


def _write_tensor(
    file: BinaryIO, expected: str, planned: tuple[tuple[int, ...], torch.dtype], name: str, tensor: Tensor
) -> None:
    assert (name, tuple(tensor.shape), tensor.dtype) == (expected, *planned)
    file.write(tensor.contiguous().view(torch.uint8).numpy().data)


def _write_config(folder: Path, hf: dict[str, Any], tokenizer: Tokenizer | None, context_length: int) -> None:
    ids = {}
    if tokenizer is not None:
        write_fast_tokenizer(tokenizer.path, folder, context_length)
        given = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        ids = {key: value for key, value in given.items() if value is not None}
    write_json(folder / "config.json", {**hf, **dict.fromkeys(("bos_token_id", "eos_token_id")), **ids})
    write_json(folder / "generation_config.json", ids)


def _publish(scratch: Path, out: Path) -> None:
    """Make everything durable, then give it its name."""
    for file in scratch.iterdir():
        with open(file, "rb+") as written:
            os.fsync(written.fileno())
    sync_folder(scratch)
    os.rename(scratch, out)
    sync_folder(out.parent)


def _special_ids(tokenizer: Tokenizer | None, config: ModelConfig) -> set[int]:
    ids = {0, config.vocab_size - 1}
    if tokenizer is not None:
        ids |= {token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None}
    return ids


def _stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """A router's choice is a hard one: it is not rounded (see `keeps_fp32`)."""
    return torch.float32 if keeps_fp32(name) else dtype


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
