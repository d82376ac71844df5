"""A trained model, ready to score and to write: from a run, one of its checkpoints, or a Hugging Face folder."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_files import tokenizer_in
from model.config import ModelConfig, padded_vocab_size
from model.decoder import Decoder
from model.parameters import buffer_shapes, keeps_fp32, parameter_shapes
from pretrain.checkpoint.folder import (
    checkpoint_path,
    list_checkpoints,
    newest_checkpoint,
    none_is_whole,
    step_of,
)
from pretrain.checkpoint.index import INDEX_NAME, DamagedError, OtherVersionError
from pretrain.checkpoint.read import CheckpointReader
from pretrain.device import detect
from pretrain.hf_folder import HuggingFaceFolder
from pretrain.language_model import LanguageModel, OwnModel
from pretrain.run_dir import RunDir

DEFAULT_CONTEXT = 2048  # for a Hugging Face folder that states none
LONGEST_CONTEXT = 4096  # what a Hugging Face folder claims may be 131,072: more than memory has room for


@dataclass(frozen=True)
class LoadedModel:
    """A model on this rank's device, its tokenizer, and where they come from.

    context_length: tokens that the model was trained to see at once. step: None for a Hugging Face folder.
    passed_over: newer checkpoints of the run that are damaged, and how.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    context_length: int
    name: str
    step: int | None
    passed_over: tuple[str, ...] = ()

    @property
    def start_token(self) -> tuple[int, str]:
        """What precedes a document's first token, and its name: BOS, or for a tokenizer without one the EOS of the
        document before. Raises ValueError if there is neither."""
        if self.tokenizer.bos_id is not None:
            return self.tokenizer.bos_id, "bos"
        if self.tokenizer.eos_id is not None:
            return self.tokenizer.eos_id, "eos"
        raise ValueError(f"{self.tokenizer.path} has neither BOS nor EOS: a document's first token has no context then")


@dataclass(frozen=True)
class _Found:
    """What a folder holds, before it is checked."""

    config: ModelConfig
    weights: dict[str, Tensor]
    tokenizer_path: Path
    tokenizer_fingerprint: str | None
    context_length: int
    step: int | None
    passed_over: tuple[str, ...] = ()


def load_model(
    target: Path, step: int | None = None, tokenizer: Path | None = None, dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Load a run (its newest checkpoint that verifies, or that of `step`), a checkpoint, or a Hugging Face folder.

    tokenizer: one to use rather than that beside the model. dtype: of the weights and the forward
    pass; routers, logits and losses are fp32 in any case. The model is built empty and each stored tensor becomes a
    parameter: memory holds the weights once, whatever their dtype.
    Raises ValueError if `target` is no model, has no such step, holds a tensor that is not finite or does not fit its
    config, or if the tokenizer is not the model's.
    """
    if RunDir(target).config_path.is_file():
        found = _from_run(RunDir(target)) if step is None else _from_checkpoint(checkpoint_of(target, step, []))
    elif step is not None or (target / INDEX_NAME).is_file():
        found = _from_checkpoint(checkpoint_of(target, step, []))
    elif (target / "config.json").is_file():
        found = _from_hf(target)
    else:
        raise ValueError(
            f"{target} is not a model: expected a run (config.yaml), a checkpoint (index.json) or a Hugging Face "
            "folder (config.json)"
        )
    _check_weights(target, found)
    loaded_tokenizer = _checked_tokenizer(target, found, tokenizer)
    with init_empty_weights():
        decoder = Decoder(found.config)
    dtypes = {name: torch.float32 if keeps_fp32(name) else dtype for name in found.weights}
    weights = {name: found.weights.pop(name).to(dtypes[name]) for name in dtypes}
    decoder.load_state_dict(weights, assign=True)
    decoder.requires_grad_(False)
    decoder.to(detect()).eval()
    return LoadedModel(
        OwnModel(decoder), loaded_tokenizer, found.context_length, str(target), found.step, found.passed_over
    )


def checkpoint_of(target: Path, step: int | None, problems: list[Exception]) -> Path:
    """The checkpoint that a folder is, or for a run's folder its newest whole one, or that of `step`.

    problems: why newer ones were passed over is added to them. Raises ValueError if there is none.
    """
    run = RunDir(target)
    if not run.config_path.is_file():
        if step is not None:
            raise ValueError(f"--step {step}: only a run has several steps, and {target} has no config.yaml")
        if not (target / INDEX_NAME).is_file():
            raise no_checkpoint(target)
        return target
    if step is None:
        newest = newest_checkpoint(run.checkpoints, problems)
        if newest is None:
            raise no_checkpoint(target)
        return newest
    chosen = checkpoint_path(run.checkpoints, step)
    if not chosen.is_dir():
        kept = ", ".join(str(step_of(path)) for path in list_checkpoints(run.checkpoints)) or "none"
        raise ValueError(f"--step {step}: {target} has no checkpoint of that step, it keeps {kept}")
    return chosen


def no_checkpoint(target: Path) -> ValueError:
    """What is to be said of a path in which there is no checkpoint."""
    if not target.exists():
        return ValueError(f"{target} does not exist")
    run = RunDir(target)
    if run.config_path.is_file():
        return ValueError(f"{target} is a run without a checkpoint: there is none in {run.checkpoints}")
    if (target / "config.json").is_file():
        return ValueError(f"{target} is a Hugging Face folder: make a checkpoint of it with `steppe import`")
    if list_checkpoints(target):
        return ValueError(f"{target} is the folder of a run's checkpoints: name the run, or one of them")
    return ValueError(f"{target} is neither a run (config.yaml) nor a checkpoint ({INDEX_NAME})")


def _from_run(run: RunDir) -> _Found:
    """The newest checkpoint that verifies."""
    problems: list[Exception] = []
    for checkpoint in reversed(list_checkpoints(run.checkpoints)):
        try:
            return replace(_from_checkpoint(checkpoint), passed_over=tuple(map(str, problems)))
        except (DamagedError, OtherVersionError, OSError) as error:
            problems.append(error)
    raise none_is_whole(run.checkpoints, problems) if problems else no_checkpoint(run.path)


def _from_checkpoint(checkpoint: Path) -> _Found:
    with CheckpointReader(checkpoint) as reader:
        index = reader.index
        return _Found(
            config=index.model,
            weights=reader.weights(),
            tokenizer_path=tokenizer_in(checkpoint),
            tokenizer_fingerprint=index.tokenizer_fingerprint,
            # What imported weights claim is what their Hugging Face folder claimed.
            context_length=index.sequence_length if index.config else min(index.sequence_length, LONGEST_CONTEXT),
            step=index.step,
        )


def _from_hf(path: Path) -> _Found:
    folder = HuggingFaceFolder(path)
    return _Found(
        config=folder.config,
        weights=folder.weights(),
        tokenizer_path=tokenizer_in(path),
        tokenizer_fingerprint=None,
        context_length=min(folder.claimed_context or DEFAULT_CONTEXT, LONGEST_CONTEXT),
        step=None,
    )


def _check_weights(target: Path, found: _Found) -> None:
    """Raise ValueError unless the tensors are those of the config, and finite."""
    shapes: Mapping[str, tuple[int, ...]] = parameter_shapes(found.config) | buffer_shapes(found.config)
    for name in sorted(shapes.keys() ^ found.weights.keys()):
        problem = "lacks the tensor" if name in shapes else "holds a tensor that its config has no place for:"
        raise ValueError(f"{target} {problem} {name}: it is incomplete, or of another architecture")
    for name, weight in found.weights.items():
        if tuple(weight.shape) != shapes[name]:
            raise ValueError(f"{target}: {name} has shape {list(weight.shape)}, its config says {list(shapes[name])}")
        if not weight.isfinite().all():
            bad = weight.numel() - int(weight.isfinite().sum())
            raise ValueError(f"{target}: {name} holds {bad} values that are NaN or infinite; use an earlier checkpoint")


def _checked_tokenizer(target: Path, found: _Found, explicit: Path | None) -> Tokenizer:
    """The tokenizer that the model was trained with. Raises ValueError for any other.

    A Hugging Face folder does not say which that is, so there only the size tells: it may fall short of the model's
    vocabulary by no more than padding explains.
    """
    path = found.tokenizer_path if explicit is None else explicit
    if not path.is_file():
        remedy = "name its tokenizer with --tokenizer FILE" if explicit is None else "check --tokenizer"
        raise ValueError(f"{target}: no tokenizer at {path}; {remedy}")
    tokenizer = Tokenizer(path)
    if found.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"{path} is not the tokenizer that {target} was trained with: its fingerprint is {tokenizer.fingerprint}, "
            f"the checkpoint says {found.tokenizer_fingerprint}"
        )
    padded_only = found.config.vocab_size <= padded_vocab_size(tokenizer.vocab_size)
    known = found.tokenizer_fingerprint is not None
    if tokenizer.vocab_size > found.config.vocab_size or not (known or padded_only):
        raise ValueError(
            f"{path} has {tokenizer.vocab_size} tokens, but the vocabulary of {target} has {found.config.vocab_size}: "
            "name the model's own with --tokenizer FILE"
        )
    return tokenizer
