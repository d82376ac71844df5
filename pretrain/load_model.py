"""A trained model, ready to score and to write: from a run, one of its checkpoints, or a Hugging Face folder."""

import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash
from accelerate import init_empty_weights
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_files import tokenizer_in
from model.config import padded_vocab_size
from model.decoder import Decoder
from model.parameters import buffer_shapes, parameter_shapes
from pretrain.checkpoint.folder import list_checkpoints, none_is_whole
from pretrain.checkpoint.index import INDEX_NAME, CheckpointIndex, DamagedError, OtherVersionError
from pretrain.checkpoint.read import CheckpointReader
from pretrain.choose_checkpoint import Step, checkpoint_of, no_checkpoint
from pretrain.device import detect
from pretrain.hf import ARCHITECTURES
from pretrain.hf_folder import HuggingFaceFolder
from pretrain.hf_unsupported import UnsupportedError
from pretrain.kernels import apply_kernels
from pretrain.language_model import LanguageModel, OwnModel
from pretrain.offload import HOST, Offload, offload_blocks
from pretrain.run_dir import RunDir, read_json
from pretrain.stored_weights import StoredWeights, checked_weights

DEFAULT_CONTEXT = 2048  # for a Hugging Face folder that states none
LONGEST_CONTEXT = 4096  # what a Hugging Face folder claims may be 131,072: more than memory has room for
MOST_PADDING = 1024  # multiples to which published models pad their vocabularies


@dataclass(frozen=True)
class LoadedModel:
    """A model on this rank's device, its tokenizer, and where they come from.

    context_length: tokens that the model was trained to see at once. longest_context: tokens that it can see at once
    at all (GPT-2's learned positions), None where nothing limits it (RoPE). step: None for a Hugging Face folder.
    fingerprint: of the config and the values of all weights as they are stored, whatever they are computed in.
    passed_over: newer checkpoints of the run that are damaged, and how.
    notes: what else a reader of its results should know.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    context_length: int
    longest_context: int | None
    name: str
    step: int | None
    fingerprint: str
    passed_over: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

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
class _Asked:
    """What to load, and how."""

    target: Path
    tokenizer: Path | None
    dtype: torch.dtype
    offload: Offload | None


def load_model(
    target: Path,
    step: Step = None,
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.float32,
    offload: Offload | None = None,
) -> LoadedModel:
    """Load a run (its newest checkpoint that verifies, or that of `step`), a checkpoint, or a Hugging Face folder.

    tokenizer: one to use rather than that beside the model. dtype: of the weights and the forward pass; routers, logits
    and losses are fp32 in any case. offload: where the blocks are while they do not compute, see `pretrain/offload.py`.

    Weights are read in place, one at a time, whatever the layout that saved them: memory holds them once, in `dtype`,
    and one more as it is stored; with offload `disk`, the embedding, the head and the largest block. Each is read and
    checked once in any case. A Hugging Face folder that our decoder does not compute is left to transformers.
    Raises ValueError if `target` is no model, has no such step, holds a tensor that is not finite or does not fit its
    config, or if the tokenizer is not the model's.
    """
    asked = _Asked(target, tokenizer, dtype, offload)
    run = RunDir(target)
    if run.config_path.is_file() and step is None:
        return _from_run(run, asked)
    if run.config_path.is_file() or step is not None or (target / INDEX_NAME).is_file():
        return _from_checkpoint(checkpoint_of(target, step, []), asked)
    if not (target / "config.json").is_file():
        raise ValueError(
            f"{target} is not a model: expected a run (config.yaml), a checkpoint (index.json) or a Hugging Face "
            "folder (config.json)"
        )
    try:
        return _from_hf(HuggingFaceFolder(target), asked)
    except UnsupportedError as unsupported:
        return _from_transformers(asked, unsupported)


def _from_run(run: RunDir, asked: _Asked) -> LoadedModel:
    """The newest checkpoint that verifies."""
    problems: list[Exception] = []
    for checkpoint in reversed(list_checkpoints(run.checkpoints)):
        try:
            return replace(_from_checkpoint(checkpoint, asked), passed_over=tuple(map(str, problems)))
        except (DamagedError, OtherVersionError, OSError) as error:
            problems.append(error)
    raise none_is_whole(run.checkpoints, problems) if problems else no_checkpoint(run.path)


def _from_checkpoint(checkpoint: Path, asked: _Asked) -> LoadedModel:
    with CheckpointReader(checkpoint) as reader:
        index = reader.index
        _check_shapes(asked.target, index)
        tokenizer = _checked_tokenizer(
            asked, tokenizer_in(checkpoint), index.model.vocab_size, index.tokenizer_fingerprint
        )
        model, fingerprint = _own_model(asked, StoredWeights(index.model, reader.tensor, asked.dtype))
        if asked.offload == "disk":
            weakref.finalize(model.decoder, reader.close)  # which until then opens its files again as they are needed
        return LoadedModel(
            model,
            tokenizer,
            # What imported weights claim is what their Hugging Face folder claimed.
            context_length=index.sequence_length if index.config else min(index.sequence_length, LONGEST_CONTEXT),
            longest_context=None,
            name=str(asked.target),
            step=index.step,
            fingerprint=fingerprint,
        )


def _from_hf(folder: HuggingFaceFolder, asked: _Asked) -> LoadedModel:
    tokenizer = _checked_tokenizer(asked, tokenizer_in(folder.path), folder.config.vocab_size)
    model, fingerprint = _own_model(asked, StoredWeights(folder.config, folder.parameter, asked.dtype))
    return LoadedModel(
        model,
        tokenizer,
        context_length=_context_length(folder.claimed_context),
        longest_context=None,
        name=str(asked.target),
        step=None,
        fingerprint=fingerprint,
    )


def _context_length(claimed: int | None) -> int:
    """Tokens that a Hugging Face folder's model was trained to see, as far as what it claims can be believed."""
    return min(claimed or DEFAULT_CONTEXT, LONGEST_CONTEXT)


def _from_transformers(asked: _Asked, unsupported: UnsupportedError) -> LoadedModel:
    """What our decoder does not compute, for the reason that `unsupported` says."""
    from pretrain.transformers_folder import TransformersFolder  # and transformers, which takes seconds to import

    folder = TransformersFolder(asked.target)
    tokenizer = _checked_tokenizer(asked, tokenizer_in(asked.target), folder.vocab_size)
    model, longest, fingerprint = folder.load(asked.dtype, asked.offload, detect())
    own_type = read_json(asked.target / "config.json")["model_type"] in ARCHITECTURES
    return LoadedModel(
        model,
        tokenizer,
        context_length=_context_length(folder.claimed_context),
        longest_context=longest,
        name=str(asked.target),
        step=None,
        fingerprint=fingerprint,
        notes=(f"computed by transformers' {folder.architecture}{f', since {unsupported}' if own_type else ''}",),
    )


def _own_model(asked: _Asked, weights: StoredWeights) -> tuple[OwnModel, str]:
    """Our decoder, and the fingerprint of its weights. It is built empty; each weight that was read becomes a
    parameter, on the device at once, or is read again when it is needed.

    Raises ValueError for a weight that is not finite.
    """
    device = detect()
    with init_empty_weights():
        decoder = Decoder(weights.config)
    blocks = [(f"layers.{index}", block) for index, block in enumerate(decoder.layers)]
    of_blocks = {f"{name}.{own}" for name, block in blocks for own, _ in block.named_parameters()}
    digest = xxhash.xxh3_64(weights.config.model_dump_json().encode())
    kept: dict[str, Tensor] = {}
    for name, weight in checked_weights(str(asked.target), weights, weights.read, digest):
        if name in of_blocks and asked.offload == "disk":
            kept[name] = torch.empty_like(weight, dtype=weights.dtype_of(name), device="meta")
        else:
            home = HOST if name in of_blocks and asked.offload == HOST else device
            kept[name] = weights.cast(name, weight.to(home))
        del weight
    decoder.load_state_dict(kept, assign=True)
    decoder.requires_grad_(False).eval()
    apply_kernels(decoder, device)
    if asked.offload is None:
        decoder.to(device)  # what is no weight: counters of experts
    else:
        offload_blocks(blocks, weights if asked.offload == "disk" else kept, device)
    return OwnModel(decoder), digest.hexdigest()


def _check_shapes(target: Path, index: CheckpointIndex) -> None:
    """Raise ValueError unless a checkpoint's tensors are those of its config."""
    shapes = parameter_shapes(index.model) | buffer_shapes(index.model)
    for name in sorted(shapes.keys() ^ index.parameters.keys()):
        problem = "lacks the tensor" if name in shapes else "holds a tensor that its config has no place for:"
        raise ValueError(f"{target} {problem} {name}: it is incomplete, or of another architecture")
    for name, shape in shapes.items():
        stored = index.parameters[name].shape
        if stored != shape:
            raise ValueError(f"{target}: {name} has shape {list(stored)}, its config says {list(shape)}")


def _checked_tokenizer(asked: _Asked, beside: Path, vocab_size: int, fingerprint: str | None = None) -> Tokenizer:
    """The tokenizer that the model was trained with. Raises ValueError for any other.

    fingerprint: of that one. A Hugging Face folder does not say it, so there only the size tells: the tokenizer may
    fall short of the model's vocabulary by no more than padding explains, ours for one that was named, and the widest
    known for the one that lies beside the weights.
    """
    path = beside if asked.tokenizer is None else asked.tokenizer
    if not path.is_file():
        remedy = "name its tokenizer with --tokenizer FILE" if asked.tokenizer is None else "check --tokenizer"
        raise ValueError(f"{asked.target}: no tokenizer at {path}; {remedy}")
    tokenizer = Tokenizer(path)
    if fingerprint not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"{path} is not the tokenizer that {asked.target} was trained with: its fingerprint is "
            f"{tokenizer.fingerprint}, the checkpoint says {fingerprint}"
        )
    pieces = tokenizer.vocab_size
    most = padded_vocab_size(pieces) if asked.tokenizer else -(-pieces // MOST_PADDING) * MOST_PADDING
    if pieces > vocab_size or (fingerprint is None and vocab_size > most):
        raise ValueError(
            f"{path} has {pieces} tokens, but the vocabulary of {asked.target} has {vocab_size}: name the model's own "
            "with --tokenizer FILE"
        )
    return tokenizer
