"""From a Hugging Face folder to a checkpoint, to evaluate, to write with and to continue pretraining from."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_files import tokenizer_in
from model.accounting import parameter_counts
from model.config import ModelConfig
from model.parameters import parameter_shapes
from pretrain.checkpoint.commit import write_weights
from pretrain.hf_folder import HuggingFaceFolder
from pretrain.load_model import DEFAULT_CONTEXT


def import_model(
    folder: Path, out: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Write the model of `folder` as the checkpoint `out`; returns what `--json` prints.

    Weights become fp32, which holds every value of bf16 and fp16. One parameter is in memory at a time, a layer's
    stacked experts being one. The folder's tokenizer comes along; without one the checkpoint has no tokenizer.
    progress: bytes of fp32 done, and of how many.
    Raises FileExistsError if `out` exists; FileNotFoundError or ValueError if the folder is no model of ours, has its
    weights in pickle files, or lies about them.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another --out, or remove it")
    model = HuggingFaceFolder(folder)
    tokenizer = _tokenizer(folder, model.config)
    context_length = model.claimed_context or DEFAULT_CONTEXT
    total = 4 * sum(map(math.prod, parameter_shapes(model.config).values()))
    done = 0

    def tensor(name: str) -> Tensor:
        nonlocal done
        weight = model.parameter(name).float()
        bad = weight.numel() - int(weight.isfinite().sum())
        if bad:
            raise ValueError(f"{folder}: {name} holds {bad} values that are NaN or infinite")
        done += weight.nbytes
        progress(done, total)
        return weight

    write_weights(out, model.config, context_length, tokenizer, tensor)
    return {
        "path": str(out),
        "model": str(folder),
        "parameters": parameter_counts(model.config)["total"],
        "sequence_length": context_length,
        "tokenizer": tokenizer is not None,
        "set": [f"model={as_override(model.config)}", f"init_from={out}"],
    }


def as_override(config: ModelConfig) -> str:
    """The model as the value of `--set model=`: YAML on one line.

    Every field that belongs to the architecture, defaults too, for an override merges into what a recipe says. Which
    tokens attend to each other is the new run's own matter (`document_mask`).
    """
    fields = config.model_dump(mode="json", exclude={"document_mask"})
    return yaml.safe_dump(fields, default_flow_style=True, sort_keys=False, width=1 << 20).strip()


def _tokenizer(folder: Path, config: ModelConfig) -> Path | None:
    path = tokenizer_in(folder)
    if not path.is_file():
        return None
    pieces = Tokenizer(path).vocab_size
    if pieces > config.vocab_size:
        raise ValueError(f"{path} has {pieces} pieces, but the model's vocabulary {config.vocab_size}: it is another's")
    return path
